"""Layers with a ring for their history do what they do with the history itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavelet_lm.transforms.crawl import Crawl, Filter, Shift
from wavelet_lm.transforms.exponential_mean import ExponentialMean
from wavelet_lm.transforms.ring import Clock, Ring
from wavelet_lm.transforms.running_mean import running_mean
from wavelet_lm.transforms.windowed_mean import WindowedMean

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
        assert new is state
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
    torch.testing.assert_close(in_chunks(mean, x[:, 7:], ring, clock, sizes), slow[:, 7:])
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
    for mean, history in (
        (running_mean, lambda state: state.total[:, None]),
        (exponential, lambda state: torch.cat(state, -1)[:, None]),
    ):
        expected, _ = mean(x)
        _, state = mean(x[:, :5])
        clock = Clock(torch.full((B,), 5))
        ring = Ring(history(state), clock, MAX_STEP)
        y = in_chunks(mean, x[:, 5:], ring, clock, sizes)
        torch.testing.assert_close(y, expected[:, 5:])


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
