import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from wavelet_lm import UserError
from wavelet_lm.inference.sampling import (
    SamplingOptions,
    draw,
    keep_top_k,
    keep_top_p,
    penalize,
    probabilities,
)

# A grid, so that distinct logits stay distinct under the arithmetic of either version.
values = st.integers(-320, 320).map(lambda n: n / 64)
vectors = st.lists(values, min_size=1, max_size=12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kept(logits):
    return {i for i, x in enumerate(logits.tolist()) if x > -math.inf}


def softmax(xs):
    weights = [math.exp(x - max(xs)) for x in xs]
    return [w / sum(weights) for w in weights]


def slow_probabilities(logits, seen, options):
    """One row, in Python floats, straight from the definitions; None where a sum is too close."""
    xs = list(logits)
    for i, is_seen in enumerate(seen):
        if is_seen:
            xs[i] = (
                xs[i] / options.repetition_penalty
                if xs[i] > 0
                else (xs[i] * options.repetition_penalty)
            )
    xs = [x / options.temperature for x in xs]
    order = sorted(range(len(xs)), key=lambda i: -xs[i])
    if options.top_k:
        order = order[: options.top_k]
    if options.top_p < 1:
        held, nucleus = 0.0, []
        for i, p in zip(order, softmax([xs[i] for i in order]), strict=True):
            if abs(held - options.top_p) < 1e-9:
                return None
            if held < options.top_p:
                nucleus.append(i)
            held += p
        order = nucleus
    result = [0.0] * len(xs)
    for i, p in zip(order, softmax([xs[i] for i in order]), strict=True):
        result[i] = p
    return result


@settings(deadline=None)
@given(
    rows=st.integers(1, 12).flatmap(
        lambda V: st.lists(
            st.tuples(
                st.lists(values, min_size=V, max_size=V, unique=True),
                st.lists(st.booleans(), min_size=V, max_size=V),
            ),
            min_size=1,
            max_size=3,
        )
    ),
    options=st.builds(
        SamplingOptions,
        temperature=st.floats(0.3, 5),
        top_k=st.integers(0, 14),
        top_p=st.floats(0.01, 1),
        repetition_penalty=st.floats(0.3, 3),
    ),
)
# Of 4/7, 1/7, 2/7 top_k leaves 2/3 and 1/3: one token holds p = 0.6 then, and two without it.
@example(
    rows=[([0.5, 0.0, 0.25], [False] * 3)],
    options=SamplingOptions(temperature=0.25 / math.log(2), top_k=2, top_p=0.6),
)
def test_the_distribution_is_the_slow_one(rows, options):
    logits = torch.tensor([x for x, _ in rows], dtype=torch.float64)
    seen = torch.tensor([s for _, s in rows])
    penalized = penalize(logits, seen, options.repetition_penalty)
    # Where the penalty makes two logits tie, either may be kept.
    assume(all(gap > 1e-6 for gap in penalized.sort().values.diff().flatten().tolist()))
    slow = [slow_probabilities(x, s, options) for x, s in rows]
    assume(None not in slow)
    fast = probabilities(logits, seen, options)
    torch.testing.assert_close(fast, torch.tensor(slow, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(vectors, st.integers(1, 14))
def test_top_k_keeps_exactly_k_even_where_logits_tie(xs, k):
    logits = torch.tensor(xs)
    result = keep_top_k(logits[None], k)[0]
    chosen = kept(result)
    assert len(chosen) == min(k, len(xs))
    assert sorted((xs[i] for i in chosen), reverse=True) == sorted(xs, reverse=True)[:k]
    assert all(result[i] == logits[i] for i in chosen)


@settings(deadline=None)
@given(vectors, st.floats(0.01, 0.999))
def test_top_p_is_the_smallest_set_that_holds_p(xs, p):
    chosen = kept(keep_top_p(torch.tensor(xs, dtype=torch.float64)[None], p)[0])
    weights = softmax(xs)
    held = sorted(weights[i] for i in chosen)
    assert sum(held) >= p - 1e-9
    assert sum(held[1:]) < p + 1e-9
    assert min(held) >= max((weights[i] for i in range(len(xs)) if i not in chosen), default=0)


def test_greedy_is_the_argmax_after_the_penalty():
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1.0, -3.0, -2.0]])
    none, seen = torch.zeros(2, 3, dtype=torch.bool), torch.tensor([[False, True, False]] * 2)
    greedy = SamplingOptions(temperature=0, repetition_penalty=2)
    assert draw(logits, none, greedy, generator()).tolist() == [1, 0]
    assert draw(logits, seen, greedy, generator()).tolist() == [2, 0]
    seen[1] = torch.tensor([True, False, False])  # −1 becomes −2.5, below −2
    greedy = SamplingOptions(temperature=0, repetition_penalty=2.5)
    assert draw(logits, seen, greedy, generator()).tolist() == [2, 2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-7])
def test_a_tiny_temperature_is_greedy_and_finite(temperature):
    logits = torch.tensor([[80.0, -90.0, 80.001]])
    options = SamplingOptions(temperature=temperature)
    assert probabilities(logits, torch.zeros(1, 3, dtype=torch.bool), options).tolist() == [
        [0, 0, 1]
    ]


def test_tokens_are_drawn_as_often_as_their_probability_says():
    n, options = 40_000, SamplingOptions(temperature=0.7, top_k=4, top_p=0.95)
    logits = torch.tensor([0.5, 1.5, -2.0, 1.0, 0.0, -9.0]).expand(n, -1)
    seen = torch.zeros(n, 6, dtype=torch.bool)
    expected = torch.tensor(slow_probabilities(logits[0].tolist(), [False] * 6, options))
    counts = torch.bincount(draw(logits, seen, options, generator(3)), minlength=6)
    deviation = (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() <= 5 * deviation).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": math.inf},
    ],
)
def test_options_out_of_range_name_themselves(bad):
    with pytest.raises(UserError, match=rf"^{next(iter(bad))} is .*; it must be [^\n]*$"):
        SamplingOptions(**bad)
