"""Layers with a ring for their history do what they do with the history itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from wavelet_lm.transforms.delays import Crawl, Filter, Shift
from wavelet_lm.transforms.history import Clock, Ring, remember
from wavelet_lm.transforms.means import (
    ExponentialMean,
    ExponentialMeanState,
    RunningMeanState,
    WindowedMean,
    WindowedMeanState,
    running_mean,
)

B, C, MAX_STEP = 3, 4, 4

crawl = Crawl(level=2, k=5).double()
torch.nn.init.normal_(crawl.logits)
DELAYS = {
    "shift": Shift(5),
    "crawl": crawl,
    "filter": Filter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), min_lag=2),
}
chunks = st.lists(st.integers(1, MAX_STEP), min_size=1, max_size=12)


def signal(T):
    generator = torch.Generator().manual_seed(T)
    return torch.randn(B, T, C, generator=generator, dtype=torch.float64)


def in_chunks(layer, x, state, clock, sizes):
    outputs = []
    for part in x.split(sizes, dim=1):
        y, new = layer(part, state)
        for old, same in zip(tree_leaves(state), tree_leaves(new), strict=True):
            assert old is same, "a buffer was replaced, not written"
        clock.advance(part.shape[1])
        outputs.append(y)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("name", DELAYS)
@given(sizes=chunks, start=st.integers(0, 50))
@torch.no_grad()
def test_delays(name, sizes, start):
    delay = DELAYS[name]
    x = signal(9 + sum(sizes))
    expected, _ = delay(x)
    _, history = delay(x[:, :9])
    # Rows may be at different positions; only what lies back counts for a delay.
    clock = Clock(torch.tensor([start, start + 1, start + 7]))
    ring = Ring(history, clock, MAX_STEP)
    y = in_chunks(delay, x[:, 9:], ring, clock, sizes)
    torch.testing.assert_close(y, expected[:, 9:])
    torch.testing.assert_close(ring.history(), delay(x)[1])


@pytest.mark.parametrize("N", [1, 3, 20])
@given(sizes=chunks)
def test_windowed_means_are_the_slow_ones(N, sizes):
    x, T = signal(7 + sum(sizes)), 7 + sum(sizes)
    slow = torch.stack([x[:, max(0, t - N + 1) : t + 1].mean(1) for t in range(T)], 1)
    mean = WindowedMean(N)
    y, state = mean(x[:, :7])
    torch.testing.assert_close(y, slow[:, :7])
    clock = Clock(state.count.clone())
    ring = Ring(state.history, clock, MAX_STEP)
    static = WindowedMeanState(ring, clock)
    torch.testing.assert_close(in_chunks(mean, x[:, 7:], static, clock, sizes), slow[:, 7:])
    rest, state = mean(x[:, 7:], state)
    torch.testing.assert_close(rest, slow[:, 7:])
    torch.testing.assert_close(ring.history(), state.history)


def test_a_windowed_mean_does_not_drift():
    """After 100,000 large positions the small ones that follow are still exact."""
    x = torch.ones(1, 100_064, 1)
    x[:, :100_000] = 1e6 * torch.rand(1, 100_000, 1)
    y, _ = WindowedMean(32)(x)
    assert torch.equal(y[:, -32:], torch.ones(1, 32, 1))


@given(sizes=chunks)
@torch.no_grad()
def test_running_and_exponential_means(sizes):
    exponential = ExponentialMean(C).double()
    x = signal(5 + sum(sizes))
    for mean in (running_mean, exponential):
        expected, after = mean(x)
        _, state = mean(x[:, :5])
        clock = Clock(torch.full((B,), 5))
        rings = [Ring(part, clock, MAX_STEP) for part in state if part.ndim == 2]
        if isinstance(state, RunningMeanState):
            static = RunningMeanState(*rings, clock)
        else:
            static = ExponentialMeanState(*rings)
        y = in_chunks(mean, x[:, 5:], static, clock, sizes)
        torch.testing.assert_close(y, expected[:, 5:])
        for ring, part in zip(rings, after, strict=False):
            torch.testing.assert_close(ring.history(), part)


@given(max_lag=st.integers(0, 9), sizes=chunks, start=st.integers(0, 20))
def test_both_forms_of_a_signal_say_the_same(max_lag, sizes, start):
    """Every view of a signal, from a ring as from the tensors themselves."""
    past = signal(max_lag)
    clock = Clock(torch.tensor([start, start + 1, start + 7]))
    ring, taps = Ring(past, clock, MAX_STEP), torch.arange(1.0, max_lag + 2).double()
    for part in signal(sum(sizes)).split(sizes, dim=1):
        still, moving = remember(part, past, max_lag), remember(part, ring, max_lag)
        assert torch.equal(still.whole(), moving.whole())
        assert torch.equal(still.delayed(max_lag), moving.delayed(max_lag))
        for min_lag in range(max_lag + 1):
            some = taps[: max_lag + 1 - min_lag]
            torch.testing.assert_close(
                still.filtered(some, min_lag), moving.filtered(some, min_lag)
            )
        clock.advance(part.shape[1])
        past = still.state


@given(sizes=chunks)
def test_both_forms_show_attention_the_same(sizes):
    """Of a text that fits: every position sees all up to itself, whatever the form."""
    T = sum(sizes)
    x, at = signal(T), 0
    clock = Clock(torch.zeros(B, dtype=torch.int64))
    past, ring = None, Ring(torch.zeros(B, T, C, dtype=torch.float64), clock, MAX_STEP)
    for part in x.split(sizes, dim=1):
        expected = x.cumsum(1)[:, at : at + part.shape[1]]
        for state in (past, ring):
            seen = remember(part, state, T)
            values, mask = seen.visible(clock)
            if mask is None:
                mask = torch.ones(len(part[0]), len(part[0])).tril().bool()
            torch.testing.assert_close(mask.double() @ values, expected)
            past = past if state is ring else seen.state
        clock.advance(part.shape[1])
        at += part.shape[1]


@given(st.integers(1, 9), st.integers(1, MAX_STEP))
def test_positions_taken_back_are_overwritten(max_lag, T):
    clock = Clock(torch.tensor([11, 4, 0]))
    x, wrong = signal(max_lag + T), torch.full((B, T, C), float("nan"), dtype=torch.float64)
    ring = Ring(x[:, :max_lag], clock, MAX_STEP)
    ring.write(wrong)
    clock.advance(T)
    clock.advance(-T)
    assert torch.equal(ring.history(), x[:, :max_lag])
    ring.write(x[:, max_lag:])
    clock.advance(T)
    assert torch.equal(ring.history(), x[:, T:])


def test_a_ring_of_single_steps_is_one_with_room():
    """Without room to take back: a recurrence has one slot, a signal one more than its lags."""
    torch.manual_seed(0)
    x = torch.randn(3, 9, 2)
    for history, lags in ((x[:, 3], 1), (x[:, :4], 4)):
        rings = [Ring(history, Clock(torch.tensor([4, 5, 11])), n) for n in (0, 1)]
        assert rings[0].size == (1 if history.ndim == 2 else lags + 1)
        for t in range(4, 9):
            for ring in rings:
                ring.after(x[:, t : t + 1]) if history.ndim == 2 else ring.write(x[:, t : t + 1])
                if history.ndim == 3:
                    assert torch.equal(ring.at(lags, 1), x[:, t - lags : t - lags + 1])
                ring.clock.advance(1)
            assert torch.equal(rings[0].history(), rings[1].history())
            assert torch.equal(rings[0].before(), rings[1].before())


def test_a_part_of_a_ring_is_that_of_its_texts():
    x = torch.randn(5, 7, 2)
    ring = Ring(x[:, :3], Clock(torch.arange(5)), 1)
    part = ring.narrow(1, 3, ring.clock.narrow(1, 3))
    part.write(x[1:3, 3:4])
    assert torch.equal(part.at(3, 1), x[1:3, :1])
    part.clock.advance(1)
    assert ring.clock.position.tolist() == [0, 2, 3, 3, 4]
    assert torch.equal(ring.history()[1:3], x[1:3, 1:4])
    assert torch.equal(ring.history()[[0, 3, 4]], x[[0, 3, 4], :3])
    part.load(x[1:3, 4:7])
    assert torch.equal(ring.history()[1:3], x[1:3, 4:7])
