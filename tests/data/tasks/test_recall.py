"""The generated questions against slow solvers that read what was given, token by token."""

import numpy as np
import pytest
import torch

from wavelet_lm.data.tasks.recall import (
    PARTS,
    TASKS,
    Induction,
    MultiQueryRecall,
    SelectiveCopying,
)
from wavelet_lm.errors import UserError

SHAPES = [
    MultiQueryRecall(),
    MultiQueryRecall(values=512, length=512, pairs=64, keys=64),
    MultiQueryRecall(values=9, length=40, pairs=5, keys=7, queries=17),
    MultiQueryRecall(values=300, length=12, pairs=4, keys=30),
    SelectiveCopying(),
    SelectiveCopying(values=40, length=20, items=10),
    Induction(),
    Induction(values=300, length=9),
]
SHAPE = pytest.mark.parametrize("task", SHAPES, ids=lambda task: f"{task.name}, {task.length}")


def solve_recall(task, row):
    """Positions and answers: the value of every key that comes after the pairs."""
    pairs, answers = {}, []
    for position, token in enumerate(row):
        is_key = 1 <= token <= task.keys
        if position < 2 * task.pairs and position % 2 == 0:
            assert is_key and token not in pairs
            pairs[token] = (row[position + 1], position + 1)
        elif position >= 2 * task.pairs and token:
            assert is_key
            answers.append((position, *pairs[token]))
    assert all(task.keys < value < task.vocab_size for value, _ in pairs.values())
    return answers


def solve_copying(task, row):
    """The items in their order, one for each mark."""
    items = [(token, position) for position, token in enumerate(row) if token >= 2]
    marks = [position for position, token in enumerate(row) if token == 1]
    assert marks == list(range(task.length - task.items, task.length))
    return [(mark, *item) for mark, item in zip(marks, items, strict=True)]


def solve_induction(task, row):
    """What came after the mark before the last one."""
    first, last = [position for position, token in enumerate(row) if token == 0]
    assert last == task.length - 1
    return [(last, row[first + 1], first + 1)]


SOLVERS = {"mqar": solve_recall, "copying": solve_copying, "induction": solve_induction}


@SHAPE
@pytest.mark.parametrize("part", PARTS)
def test_every_answer_follows_from_its_context(task, part):
    questions = task.questions(50, 3, part, 7)
    assert questions.inputs.shape == (50, task.length)
    assert all(tensor.dtype == torch.int64 for tensor in questions)
    assert 0 <= questions.inputs.min() and questions.inputs.max() < task.vocab_size
    for row, asked, answers, distances in zip(*(t.tolist() for t in questions), strict=True):
        given = sorted(zip(asked, answers, distances, strict=True))
        solved = [(at, answer, at - place) for at, answer, place in SOLVERS[task.name](task, row)]
        assert given == solved
        assert min(distances) >= 1


@SHAPE
def test_the_seed_the_part_and_the_step_say_what_comes(task):
    drawn = [
        task.questions(4, seed, part, step)
        for seed in (0, 1)
        for part in PARTS
        for step in (0, 1, 2)
    ]
    again = task.questions(4, 1, PARTS[-1], 2)
    assert all(torch.equal(a, b) for a, b in zip(drawn[-1], again, strict=True))
    rows = [row for questions in drawn for row in map(tuple, questions.inputs.tolist())]
    assert len(set(rows)) == len(rows)


def test_examples_do_not_come_twice_and_no_part_has_those_of_another():
    smallest = MultiQueryRecall(values=8, length=24, pairs=4, keys=8)
    for task in (smallest, MultiQueryRecall(), SelectiveCopying(), Induction()):
        rows = [
            task.questions(16, 0, part, step).inputs.numpy()
            for part, steps in zip(PARTS, (200, 20, 20), strict=True)
            for step in range(steps)
        ]
        assert len(np.unique(np.concatenate(rows), axis=0)) == 16 * 240


def test_questions_are_spread_over_all_that_follows_the_pairs():
    task = MultiQueryRecall(pairs=16, length=128)
    questions = task.questions(500, 0, "train", 0)
    counts = np.bincount(questions.asked.flatten(), minlength=128)
    assert counts[:32].sum() == 0
    # Each of 96 places is asked 500 / 6 times on average.
    assert np.abs(counts[32:] - 500 / 6).max() < 5 * np.sqrt(500 / 6)
    assert sorted(set(questions.distances.flatten().tolist()))[:3] == [1, 2, 3]
    assert questions.distances.max() > 120


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        (
            MultiQueryRecall(length=128, pairs=16, queries=64),
            [
                (4, MultiQueryRecall(length=32, pairs=4, queries=16)),
                (2, MultiQueryRecall(length=64, pairs=8, queries=32)),
            ],
        ),
        (
            SelectiveCopying(values=80, length=129, items=17),
            [
                (4, SelectiveCopying(values=80, length=32, items=4)),
                (2, SelectiveCopying(values=80, length=64, items=8)),
            ],
        ),
        (Induction(length=80), [(4, Induction(length=20)), (2, Induction(length=40))]),
    ],
)
def test_shorter_sequences_hold_less_of_the_same(task, parts):
    assert task.shorter(2) == parts
    assert task.shorter(0) == []


def test_sequences_can_be_too_short_to_begin_with():
    with pytest.raises(UserError, match=r"^a curriculum of 5 begins too small: pairs is 0;"):
        MultiQueryRecall(length=128, pairs=16, queries=64).shorter(5)
    with pytest.raises(UserError, match=r"^a curriculum of 4 begins too small: .* come twice"):
        Induction(length=80).shorter(4)


def test_every_pair_is_asked_before_any_comes_again():
    task = MultiQueryRecall(values=50, length=60, pairs=6, keys=20, queries=14)
    inputs, asked, *_ = task.questions(30, 0, "train", 0)
    for keys in inputs.gather(1, asked).tolist():
        assert len(set(keys[:6])) == len(set(keys[6:12])) == 6
        assert len(set(keys[12:])) == 2


def test_every_value_is_equally_often_the_answer():
    for task in (MultiQueryRecall(values=8), SelectiveCopying(), Induction()):
        questions = [task.questions(500, 0, "train", step) for step in range(4)]
        answers = torch.cat([q.answers.flatten() for q in questions])
        counts = np.bincount(answers, minlength=task.vocab_size)[-task.values :]
        mean = len(answers) / task.values
        assert counts.sum() == len(answers)
        assert np.abs(counts - mean).max() < 5 * np.sqrt(mean)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("mqar", {"pairs": 65}, "65 pairs need as many keys, and keys is 64"),
        ("mqar", {"length": 47}, "need 48 positions, and length is 47"),
        ("mqar", {"values": 1}, "values is 1; it must be 2 or more"),
        ("mqar", {"pairs": 0}, "pairs is 0; it must be 1 or more"),
        ("mqar", {"pairs": 2, "keys": 4, "values": 2, "length": 8}, "would come twice"),
        ("copying", {"items": 65}, "need 130 positions, and length is 128"),
        ("copying", {"items": 2, "length": 9}, "would come twice"),
        ("induction", {"length": 2}, "need 3 positions"),
        ("induction", {"length": 7}, "only 5,242,880 different sequences"),
    ],
)
def test_shapes_that_cannot_be_are_refused(name, shape, words):
    with pytest.raises(UserError, match=words) as error:
        TASKS[name](**shape)
    assert "\n" not in str(error.value)
