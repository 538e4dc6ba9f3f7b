import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import perturb, tiny_config
from wavelet_lm import UserError, build_model
from wavelet_lm.evaluation.likelihood import evaluate, score, strides, window_batches
from wavelet_lm.tables import table

CPU = torch.device("cpu")


class BigramModel(nn.Module):
    """P(next | token) from a fixed table; `seen` lists the windows [inputs, targets] it was given.

    The first target of a window costs `start_cost` nats more, so that it shows where windows start.
    """

    def __init__(self, probabilities, start_cost=0.0):
        super().__init__()
        self.nats = nn.Parameter(-torch.tensor(probabilities, dtype=torch.float64).log())
        self.start_cost = start_cost
        self.seen = []

    def token_losses(self, idx, targets, state=None):
        assert state is None
        assert not self.training
        self.seen += zip(idx.tolist(), targets.tolist(), strict=True)
        losses = self.nats[idx, targets]
        losses[:, 0] += self.start_cost
        return losses


class HistoryModel(nn.Module):
    """The loss of a target is a hash of all inputs of its window up to it: context is visible."""

    def token_losses(self, idx, targets, state=None):
        code, losses = torch.ones(len(idx), dtype=torch.long), []
        for column, target in zip(idx.unbind(1), targets.unbind(1), strict=True):
            code = (code * 31 + column + 1) % 997
            losses.append((code * 7 + target) % 101)
        return torch.stack(losses, 1).float()


def slow_score(model, tokens, block_size, stride):
    """One target at a time: the earliest window that holds it, alone and cut after the target."""
    total = 0.0
    for target in range(1, len(tokens)):
        start = 0
        while start + block_size < target:
            start += stride
        window = torch.tensor([tokens[start : target + 1].tolist()])
        total += model.token_losses(window[:, :-1], window[:, 1:])[0, -1].item()
    return total


def tokens_of(*values):
    return np.array(values, dtype=np.uint16)


class Tokens:
    name = "fake"

    def __init__(self, pieces):
        self.pieces = pieces

    def token_bytes(self, token):
        return self.pieces[token].encode()


def split_of(values, n_bytes=100, n_words=None):
    return SimpleNamespace(tokens=tokens_of(*values), n_bytes=n_bytes, n_words=n_words)


# P(next | token) for tokens 0, 1, 2; the text and its windows below are worked out by hand.
TABLE = [[0.5, 0.25, 0.25], [0.125, 0.5, 0.375], [0.25, 0.25, 0.5]]
TEXT = (0, 1, 1, 2, 0, 0, 2, 1)
# Targets:   1    1    2      0     0    2     1
# P:        .25   .5  .375   .25   .5   .25   .25
NATS = -math.log(0.25 * 0.5 * 0.375 * 0.25 * 0.5 * 0.25 * 0.25)
START = 100.0


def test_non_overlapping_windows_by_hand():
    model = BigramModel(TABLE, START).train()
    nats, n = score(model, tokens_of(*TEXT), block_size=4, stride=4, batch_size=8, device=CPU)
    assert model.seen == [([0, 1, 1, 2], [1, 1, 2, 0]), ([0, 0, 2], [0, 2, 1])]
    assert n == 7
    assert nats == pytest.approx(NATS + 2 * START, abs=1e-12)
    assert model.training


def test_sliding_windows_by_hand():
    model = BigramModel(TABLE, START)
    nats, n = score(model, tokens_of(*TEXT), block_size=4, stride=2, batch_size=8, device=CPU)
    assert model.seen == [
        ([0, 1, 1, 2], [1, 1, 2, 0]),  # scores all four
        ([1, 2, 0, 0], [2, 0, 0, 2]),  # the last two
        ([0, 0, 2], [0, 2, 1]),  # cut short by the end: the last one
    ]
    assert n == 7
    # Only the first window's first target is scored, so the cost of a start is counted once.
    assert nats == pytest.approx(NATS + START, abs=1e-12)


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=2, max_size=40),
    block_size=st.integers(1, 12),
    stride=st.integers(1, 12),
    batch_size=st.integers(1, 5),
)
def test_any_text_block_and_stride_against_one_target_at_a_time(
    tokens, block_size, stride, batch_size
):
    stride = min(stride, block_size)
    array, model, steps = tokens_of(*tokens), HistoryModel(), []
    nats, n = score(
        model,
        array,
        block_size=block_size,
        stride=stride,
        batch_size=batch_size,
        device=CPU,
        progress=steps.append,
    )
    assert n == sum(steps) == len(tokens) - 1
    assert nats == slow_score(model, array, block_size, stride)


@settings(deadline=None)
@given(
    n_tokens=st.integers(2, 200),
    block_size=st.integers(1, 40),
    divisor=st.sampled_from([1, 2]),
    batch_size=st.integers(1, 9),
)
def test_every_target_is_scored_once_and_windows_stay_within_bounds(
    n_tokens, block_size, divisor, batch_size
):
    stride = max(1, block_size // divisor)
    scored = []
    for batch, n_context in window_batches(n_tokens, block_size, stride, batch_size):
        assert len(batch) <= batch_size
        assert 2 <= batch.shape[1] <= block_size + 1
        assert (np.diff(batch, axis=1) == 1).all()
        new = batch[:, 1 + n_context :]
        assert new.size
        # Past the first window, a target has the context that the protocol promises.
        assert (batch[:, 0] == 0).any() or n_context == block_size - stride
        scored += new.flatten().tolist()
    assert sorted(scored) == list(range(1, n_tokens))


@pytest.mark.parametrize("block_size", [1, 2, 5, 64])
def test_a_uniform_model_costs_log_v_a_token(block_size):
    V = 50
    model = BigramModel(np.full((V, V), 1 / V))
    results = evaluate(
        model,
        split_of(np.random.default_rng(0).integers(0, V, 133), n_bytes=133),
        Tokens(["x"] * V),
        block_size=block_size,
    )
    for row in results.values():
        assert row["tokens"] == row["bytes"] == 132
        assert row["nll"] == pytest.approx(math.log(V), rel=1e-12)
        assert row["perplexity"] == pytest.approx(V, rel=1e-12)
        assert row["bits_per_byte"] == pytest.approx(math.log2(V), rel=1e-12)
        assert row["word_perplexity"] is None


def test_bytes_are_those_after_the_first_token_and_words_are_canonical():
    pieces = ["é", "ab", "€"]  # 2, 2 and 3 bytes
    text = (0, 1, 2, 1, 0)  # é ab € ab é: 11 bytes, 9 after the first token
    model = BigramModel(np.full((3, 3), 0.25))
    results = evaluate(model, split_of(text, 11, n_words=2), Tokens(pieces), block_size=3)
    for row in results.values():
        assert row["bytes"] == 9
        assert row["bits_per_byte"] == pytest.approx(4 * 2 / 9, rel=1e-12)
        assert row["word_perplexity"] == pytest.approx(4 ** (4 / 2), rel=1e-12)


def test_two_tokens_are_one_target_and_one_token_is_an_error():
    model = BigramModel(TABLE)
    results = evaluate(model, split_of((0, 1), 2), Tokens("abc"), block_size=8)
    assert {row["tokens"] for row in results.values()} == {1}
    assert results["sliding"]["nll"] == pytest.approx(math.log(4), rel=1e-12)
    # A first token that holds all bytes leaves none to divide by.
    assert (
        evaluate(model, split_of((0, 1), 1), Tokens(["a", "", ""]), block_size=8)["sliding"][
            "bits_per_byte"
        ]
        is None
    )
    with pytest.raises(UserError, match="1 tokens"):
        evaluate(model, split_of((0,)), Tokens("abc"), block_size=8)


def test_losses_that_are_not_finite_are_an_error():
    with pytest.raises(UserError, match="not finite"):
        evaluate(
            BigramModel([[math.nan, 1], [0, 1]]), split_of((0, 0, 1)), Tokens("ab"), block_size=2
        )


def test_strides_of_the_protocols():
    assert strides(256) == {"non_overlapping": 256, "sliding": 128}
    assert strides(5) == {"non_overlapping": 5, "sliding": 2}
    assert strides(1) == {"non_overlapping": 1, "sliding": 1}


def test_the_real_model_against_one_target_at_a_time():
    model = perturb(build_model(tiny_config(), 13)).double().eval()
    tokens = np.random.default_rng(1).integers(0, 13, 45).astype(np.uint8)
    for stride in (8, 4):
        nats, _ = score(model, tokens, block_size=8, stride=stride, batch_size=3, device=CPU)
        assert nats == pytest.approx(slow_score(model, tokens, 8, stride), rel=1e-10)


def test_the_table_is_aligned_and_results_are_json():
    results = evaluate(BigramModel(TABLE), split_of(TEXT * 1000, 9000), Tokens("abc"), block_size=4)
    assert json.loads(json.dumps(results)) == results
    head, *rows = table(results).splitlines()
    assert head.split()[:4] == ["windows", "nats/token", "perplexity/token", "bits/byte"]
    assert len({len(line) for line in [head, *rows]}) == 1
    assert rows[0].startswith("non-overlapping, 4 by 4 ")
    assert rows[1].split()[4:9:4] == [f"{results['sliding']['nll']:.4f}", "7,999"]
