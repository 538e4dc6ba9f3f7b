import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from wavelet_lm import UserError
from wavelet_lm.config.run import LARGEST, SMALLEST
from wavelet_lm.inference.sampling.logits import (
    SamplingOptions,
    adaptive_temperature,
    adjusted,
    draw,
    draw_from,
    entropy,
    keep_likeliest,
    log_probs_of,
    penalize,
    probabilities,
)

# A grid, so that distinct logits stay distinct under the arithmetic of either version.
values = st.integers(-320, 320).map(lambda n: n / 64)
vectors = st.lists(values, min_size=1, max_size=12)


def random_uniforms(n, seed=0):
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kept(logits):
    return {i for i, x in enumerate(logits.tolist()) if x > -math.inf}


def softmax(xs):
    weights = [math.exp(x - max(xs)) for x in xs]
    return [w / sum(weights) for w in weights]


def slow_entropy(xs):
    return -sum(p * math.log(p) for p in softmax(xs))


def slow_probabilities(logits, seen, options):
    """One row, in Python floats, straight from the definitions; None where a sum is too close."""
    xs, temperature = list(logits), options.temperature
    if options.entropy_adaptive:
        share = slow_entropy(logits) / math.log(len(xs)) if len(xs) > 1 else 0
        low, high = options.entropy_temp_min, options.entropy_temp_max
        temperature = high - share * (high - low)
    for i, is_seen in enumerate(seen):
        if is_seen:
            xs[i] = (
                xs[i] / options.repetition_penalty
                if xs[i] > 0
                else (xs[i] * options.repetition_penalty)
            )
    xs = [x / temperature for x in xs]
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
        entropy_adaptive=st.booleans(),
        entropy_temp_min=st.floats(0.3, 1),
        entropy_temp_max=st.floats(1, 3),
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
    result = keep_likeliest(logits[None], k=k)[0]
    chosen = kept(result)
    assert len(chosen) == min(k, len(xs))
    assert sorted((xs[i] for i in chosen), reverse=True) == sorted(xs, reverse=True)[:k]
    assert all(result[i] == logits[i] for i in chosen)


@settings(deadline=None)
@given(vectors, st.floats(0.01, 0.999))
def test_top_p_is_the_smallest_set_that_holds_p(xs, p):
    chosen = kept(keep_likeliest(torch.tensor(xs, dtype=torch.float64)[None], p=p)[0])
    weights = softmax(xs)
    held = sorted(weights[i] for i in chosen)
    assert sum(held) >= p - 1e-9
    assert sum(held[1:]) < p + 1e-9
    assert min(held) >= max((weights[i] for i in range(len(xs)) if i not in chosen), default=0)


def test_a_top_p_per_row_is_that_of_each_row_alone():
    logits = 3 * torch.randn(5, 400)
    seen = torch.rand(5, 400) < 0.1
    top_p = [0.3, 0.5, 0.99, 1.0, 1e-6]
    together = adjusted(logits, seen, SamplingOptions(top_p=0.1), torch.tensor(top_p))
    for i, p in enumerate(top_p):
        alone = adjusted(logits[i : i + 1], seen[i : i + 1], SamplingOptions(top_p=p))
        assert torch.equal(together[i : i + 1], alone)
    assert together[3].isfinite().all()
    assert len(kept(together[4])) == 1


def test_greedy_is_the_argmax_after_the_penalty():
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1.0, -3.0, -2.0]])
    none, seen = torch.zeros(2, 3, dtype=torch.bool), torch.tensor([[False, True, False]] * 2)
    uniforms = random_uniforms(2)
    greedy = SamplingOptions(temperature=0, repetition_penalty=2)
    assert draw(logits, none, greedy, uniforms).tolist() == [1, 0]
    assert draw(logits, seen, greedy, uniforms).tolist() == [2, 0]
    seen[1] = torch.tensor([True, False, False])  # −1 becomes −2.5, below −2
    greedy = SamplingOptions(temperature=0, repetition_penalty=2.5)
    assert draw(logits, seen, greedy, uniforms).tolist() == [2, 2]
    assert torch.equal(adjusted(logits, seen, greedy), penalize(logits, seen, 2.5))


def test_what_is_greedy():
    assert SamplingOptions(temperature=0, top_k=3).greedy
    assert not SamplingOptions(temperature=1e-9).greedy
    assert not SamplingOptions(temperature=0, entropy_adaptive=True).greedy


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-7])
def test_a_tiny_temperature_is_greedy_and_finite(temperature):
    logits, seen = torch.tensor([[80.0, -90.0, 80.001]]), torch.zeros(1, 3, dtype=torch.bool)
    fixed = SamplingOptions(temperature=temperature)
    adaptive = SamplingOptions(
        entropy_adaptive=True, entropy_temp_min=temperature, entropy_temp_max=temperature
    )
    for options in (fixed, adaptive):
        assert probabilities(logits, seen, options).tolist() == [[0, 0, 1]]


ends = st.sampled_from([SMALLEST, 1e-20, 0.5, 1.0, 1e20, LARGEST])
FLOAT32 = torch.finfo(torch.float32)
extremes = st.sampled_from([0.0, 1.0, -3.0, FLOAT32.tiny, 1e20, -1e20, FLOAT32.max, FLOAT32.min])


@settings(deadline=None)
@given(
    st.lists(st.tuples(extremes, st.booleans()), min_size=1, max_size=5),
    st.just(0.0) | st.just(5e-324) | ends,
    ends.filter(lambda p: p <= 1),
    ends,
    st.tuples(st.just(5e-324) | ends, ends).map(sorted),
    st.booleans(),
    st.booleans(),
)
def test_no_option_takes_finite_logits_out_of_float32(row, t, p, penalty, temps, adaptive, moving):
    """What its range allows: the distribution is one, and the token one of its."""
    logits, seen = torch.tensor([[x for x, _ in row]]), torch.tensor([[s for _, s in row]])
    options = SamplingOptions(t, 0, p, penalty, adaptive, *temps)
    top_p = torch.tensor([p]) if moving else None
    found = probabilities(logits, seen, options, top_p)
    assert found.isfinite().all() and float(found.sum()) == pytest.approx(1, abs=1e-5)
    assert penalize(logits, seen, penalty).isfinite().all()
    for u in (0.0, 0.5, math.nextafter(1, 0)):
        token = draw(logits, seen, options, torch.tensor([u], dtype=torch.float64), top_p)
        assert found[0, token] > 0 or options.greedy


def test_the_adaptive_temperature_goes_from_one_end_to_the_other():
    options = SamplingOptions(entropy_adaptive=True, entropy_temp_min=0.25, entropy_temp_max=2)
    certain, ignorant = [200.0, 0, 0, 0], [7.0] * 4
    half = [9.0, 9.0, -200, -200]  # ln 2 of ln 4
    temperature = adaptive_temperature(torch.tensor([certain, ignorant, half]), options)
    torch.testing.assert_close(temperature, torch.tensor([2, 0.25, 1.125]))
    assert adaptive_temperature(torch.tensor([[3.0]]), options).tolist() == [2]


def test_the_adaptive_temperature_is_that_of_the_raw_logits():
    logits, seen = torch.randn(1, 9, dtype=torch.float64), torch.ones(1, 9, dtype=torch.bool)
    options = SamplingOptions(repetition_penalty=3, entropy_adaptive=True)
    temperature = float(adaptive_temperature(logits, options))
    fixed = SamplingOptions(repetition_penalty=3, temperature=temperature)
    torch.testing.assert_close(adjusted(logits, seen, options), adjusted(logits, seen, fixed))


@settings(deadline=None)
@given(vectors)
def test_entropy_and_log_probabilities_are_their_definitions(xs):
    logits = torch.tensor([xs], dtype=torch.float64)
    assert float(entropy(logits)) == pytest.approx(slow_entropy(xs), abs=1e-12)
    for token, p in enumerate(softmax(xs)):
        found = float(log_probs_of(logits, torch.tensor([token])))
        assert found == pytest.approx(math.log(p), abs=1e-12)


def test_half_precision_is_computed_in_single():
    logits, seen = torch.randn(2, 300).bfloat16(), torch.rand(2, 300) < 0.5
    options = SamplingOptions(temperature=0.7, top_p=0.9, repetition_penalty=1.3)
    assert torch.equal(adjusted(logits, seen, options), adjusted(logits.float(), seen, options))
    assert torch.equal(entropy(logits), entropy(logits.float()))
    tokens = torch.tensor([3, 4])
    assert torch.equal(log_probs_of(logits, tokens), log_probs_of(logits.float(), tokens))


def test_tokens_are_drawn_as_often_as_their_probability_says():
    n, options = 40_000, SamplingOptions(temperature=0.7, top_k=4, top_p=0.95)
    logits = torch.tensor([0.5, 1.5, -2.0, 1.0, 0.0, -9.0]).expand(n, -1)
    seen = torch.zeros(n, 6, dtype=torch.bool)
    expected = torch.tensor(
        slow_probabilities(logits[0].tolist(), [False] * 6, options), dtype=torch.float64
    )
    counts = torch.bincount(draw(logits, seen, options, random_uniforms(n)), minlength=6)
    possible = expected > 0
    assert not counts[~possible].any()
    assert chisquare(counts[possible], n * expected[possible]).pvalue > 1e-3


def slow_draw(weights, u):
    """Walk along the sums until one exceeds u · total; None where they are too close to tell."""
    total = math.fsum(weights)
    for i in range(len(weights)):
        held = math.fsum(weights[: i + 1])
        if abs(held - u * total) <= 1e-12 * total and 0 < u:
            return None
        if held > u * total:
            return i
    raise AssertionError("no sum exceeds the threshold")


@settings(deadline=None)
@given(
    st.lists(st.just(0.0) | st.floats(1e-6, 1), min_size=1, max_size=30).filter(any),
    st.just(0.0) | st.floats(0, 1, exclude_max=True),
)
@example([0.0, 0.5, 0.0, 0.5, 0.0], 0.0)
@example([0.0, 0.5, 0.0, 0.5, 0.0], math.nextafter(1, 0))
def test_a_draw_inverts_the_cumulative_sums(weights, u):
    exact = {"dtype": torch.float64}
    token = int(draw_from(torch.tensor([weights], **exact), torch.tensor([u], **exact)))
    assert weights[token] > 0
    assert slow_draw(weights, u) in (None, token)


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=0.9, top_k=200, top_p=0.95, repetition_penalty=1.1),
        SamplingOptions(top_p=0.95, entropy_adaptive=True),
    ],
)
def test_a_row_draws_the_same_alone_and_in_a_batch(options):
    logits, seen, uniforms = 2 * torch.randn(6, 999), torch.rand(6, 999) < 0.1, random_uniforms(6)
    together = draw(logits, seen, options, uniforms)
    rows = [slice(i, i + 1) for i in range(6)]
    alone = [draw(logits[i], seen[i], options, uniforms[i]) for i in rows]
    assert together.tolist() == torch.cat(alone).tolist()
    assert len(set(together.tolist())) > 1


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [SamplingOptions(temperature=0), SamplingOptions(top_p=0.9)])
def test_logits_that_are_not_finite_still_give_a_token_and_spare_the_other_rows(poison, options):
    logits, seen = torch.randn(3, 50), torch.zeros(3, 50, dtype=torch.bool)
    sound = draw(logits, seen, options, random_uniforms(3))
    logits[1] = poison
    tokens = draw(logits, seen, options, random_uniforms(3))
    assert tokens[[0, 2]].tolist() == sound[[0, 2]].tolist()
    assert 0 <= tokens[1] < 50


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=0, repetition_penalty=1.2),
        SamplingOptions(temperature=0.8, top_k=5, top_p=0.9, repetition_penalty=1.2),
        SamplingOptions(top_p=0.9, entropy_adaptive=True),
    ],
)
@pytest.mark.parametrize("moving_top_p", [False, True])
def test_a_step_is_one_graph(options, moving_top_p):
    def step(logits, seen, uniforms, top_p):
        tokens = draw(logits, seen, options, uniforms, top_p)
        return tokens, log_probs_of(logits, tokens), entropy(logits)

    torch.compiler.reset()
    top_p = torch.tensor([0.5, 0.9]) if moving_top_p else None
    arguments = torch.randn(2, 40), torch.rand(2, 40) < 0.5, random_uniforms(2), top_p
    traced = torch.compile(step, fullgraph=True, backend="eager")(*arguments)
    for ours, theirs in zip(traced, step(*arguments), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.cuda
def test_a_gpu_draws_what_the_cpu_draws():
    options = SamplingOptions(temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.2)
    arguments = torch.randn(64, 5000).double(), torch.rand(64, 5000) < 0.1, random_uniforms(64)
    on_cpu = draw(*arguments[:2], options, arguments[2])
    on_gpu = draw(*(a.cuda() for a in arguments[:2]), options, arguments[2].cuda())
    assert on_gpu.tolist() == on_cpu.tolist()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": 1e-46},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": 1e-46},
        {"repetition_penalty": 1e39},
        {"repetition_penalty": 10**400},
        {"temperature": 1e39},
        {"entropy_temp_min": 0.0},
        {"entropy_temp_min": math.nan},
        {"entropy_temp_max": math.inf},
        {"entropy_temp_max": 1e39},
        {"entropy_temp_max": 0.2},
    ],
)
def test_options_out_of_range_name_themselves(bad):
    with pytest.raises(UserError, match=rf"^{next(iter(bad))} is .*; it must be [^\n]*$"):
        SamplingOptions(**bad)
