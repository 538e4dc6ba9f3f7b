"""Answers are counted as they are: an oracle's, those of chance, and those of real models."""

import math
import random

import numpy as np
import pytest
import torch

from tests.conftest import perturb, tiny_config
from tests.evaluation.readers import Reader, sure_of
from wavelet_lm import build_model
from wavelet_lm.data.tasks.recall import Induction, MultiQueryRecall, SelectiveCopying
from wavelet_lm.evaluation.answers import by_farthest, judge, logits_at, tally

TASKS = [
    MultiQueryRecall(values=9, length=40, pairs=5, keys=7, queries=12),
    SelectiveCopying(length=40, items=9),
    Induction(length=40),
]


def after_the_first(text):
    """What followed the first time that the last token stood in the text."""
    return text[text.index(text[-1]) + 1] if text[-1] in text[:-1] else None


def next_item(text):
    """The item that the last mark asks for."""
    items = [token for token in text if token >= 2]
    return items[text.count(1) - 1] if text[-1] == 1 else None


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_an_oracle_has_every_answer(task):
    solve = next_item if task.name == "copying" else after_the_first
    oracle = Reader(lambda text: sure_of(solve(text), task.vocab_size))
    batches = [task.questions(6, 0, "test", step) for step in range(3)]
    found = judge(oracle, batches)
    assert found["accuracy"] == found["streamed"] == 1
    assert found["questions"] == sum(b.answers.numel() for b in batches)
    assert found["nats"] < 1e-6
    assert found["largest_difference"] == 0
    assert all(row["accuracy"] == 1 for row in found["by_distance"])


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_drawing_from_the_values_gives_chance(task):
    draws = random.Random(0)
    first = task.vocab_size - task.values
    guesser = Reader(lambda text: sure_of(first + draws.randrange(task.values), task.vocab_size))
    batches = [task.questions(50, 0, "test", step) for step in range(6)]
    found = judge(guesser, batches, streamed=False)
    deviation = math.sqrt(task.chance / found["questions"])
    assert abs(found["accuracy"] - task.chance) < 5 * deviation


def test_distances_are_counted_in_doubling_ranges():
    distances = np.array([1, 8, 9, 16, 16, 17, 100])
    right = np.array([1, 0, 1, 1, 0, 0, 1], dtype=bool)
    found = tally(right, distances)
    assert (found["questions"], found["accuracy"]) == (7, pytest.approx(4 / 7))
    rows = [tuple(row.values()) for row in found["by_distance"]]
    assert rows == [(1, 8, 2, 0.5), (9, 16, 3, 2 / 3), (17, 32, 1, 0), (65, 128, 1, 1)]
    assert by_farthest(found) == {8: 0.5, 16: 2 / 3, 32: 0, 128: 1}


NETWORKS = [
    {"model": "gpt", "heads": 2},
    {"model": "wavelet_gpt", "heads": 2, "wavelet_module": "ema"},
    {},
    {"wavelet_mode": "haar", "wavelet_crawl": False, "loop_iterations": 2},
    {"decompose_bypass_ema": True, "phase_gating": True},
    {"delta_memory": True, "delta_heads": 2, "delta_key_dim": 4, "delta_value_dim": 3},
    {"multinodal_enabled": True, "multinodal_num_cells": 2, "multinodal_cell_dim": 8},
]


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_streamed_texts_and_windows_agree(network):
    task = TASKS[0]
    config = tiny_config(block_size=task.length, **network)
    model = perturb(build_model(config, task.vocab_size)).double().eval()
    questions = task.questions(5, 0, "test", 0)
    found = judge(model, [questions])
    assert found["largest_difference"] < 1e-10
    assert found["streamed"] == found["accuracy"]
    with torch.no_grad():
        everywhere, _ = model(questions.inputs)
        for chunk in (None, 1, 7):
            logits = logits_at(model, questions.inputs, questions.asked, chunk)
            for row, at in enumerate(questions.asked):
                torch.testing.assert_close(logits[row], everywhere[row, at])


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_the_loss_counts_the_answers_alone(network):
    """Its value and its gradients are those of cross-entropy over the asked positions."""
    task = TASKS[0]
    off = {f"dropout_{p}": 0 for p in ("embedding", "mixer", "projection", "mlp", "lm_head")}
    config = tiny_config(block_size=task.length, **{**network, **off, "loop_iterations": 1})
    model = perturb(build_model(config, task.vocab_size)).double()
    inputs, asked, answers, _ = task.questions(3, 0, "train", 0)
    loss, _ = model.loss(inputs, answers, None, asked)
    loss.backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    logits, _ = model(inputs)
    terms = [
        -logits[row, at].log_softmax(-1)[answer]
        for row in range(3)
        for at, answer in zip(asked[row], answers[row], strict=True)
    ]
    expected = sum(terms) / len(terms)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    scale = math.sqrt(2) if config.multinodal_enabled else 1
    for ours, parameter in zip(found, model.parameters(), strict=True):
        assert (ours is None) == (parameter.grad is None)
        if ours is not None:
            torch.testing.assert_close(ours * scale, parameter.grad)
