from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch.autograd import gradcheck

from wavelet_lm.transforms.correlation import DelayedSum, FilterLess, correlate, written
from wavelet_lm.transforms.delays import Crawl, Shift
from wavelet_lm.transforms.history import remember


def slow_crawl(x: torch.Tensor, crawl: Crawl) -> torch.Tensor:
    """The formula, one position and one lag at a time."""
    weights = crawl.logits.double().softmax(0)
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for j, weight in enumerate(weights):
            lag = crawl.min_lag + j
            if t - lag >= 0:
                y[:, t] += weight * x[:, t - lag]
    return y


@pytest.mark.parametrize("level", [0, 1, 3, 5])
@pytest.mark.parametrize("k", [1, 3, 5, 9, 33])
@pytest.mark.parametrize("T", [1, 7, 64, 65, 150])
def test_equals_slow_loop(level, k, T):
    crawl = Crawl(level, k).double()
    crawl.logits.data += torch.randn(k)
    x = torch.randn(2, T, 3, dtype=torch.float64)
    past, history = crawl(x)
    torch.testing.assert_close(past, slow_crawl(x, crawl), rtol=0, atol=1e-12)
    assert history.shape == (2, crawl.max_lag, 3)


@pytest.mark.parametrize("level,k,first,last", [(0, 3, 1, 3), (2, 3, 3, 5), (4, 33, 1, 33)])
def test_lags_are_those_of_the_definition(level, k, first, last):
    crawl = Crawl(level, k)
    assert (crawl.min_lag, crawl.max_lag) == (first, last)
    assert crawl.logits.argmax() + crawl.min_lag == 2**level


def test_starts_near_the_plain_shift():
    x = torch.randn(1, 40, 4)
    assert (Crawl(3, 3)(x)[0] - Shift(8)(x)[0]).abs().mean() < 0.05


@given(lag=st.integers(1, 9), T=st.integers(1, 20), cuts=st.lists(st.integers(1, 19), max_size=4))
def test_shift_in_any_chunks(lag, T, cuts):
    x = torch.arange(1.0, 2 * T + 1).view(1, T, 2)
    expected = torch.zeros_like(x)
    if lag < T:
        expected[:, lag:] = x[:, : T - lag]
    shift, history, chunks = Shift(lag), None, []
    bounds = sorted({0, T, *(c for c in cuts if c < T)})
    for start, end in pairwise(bounds):
        y, history = shift(x[:, start:end], history)
        chunks.append(y)
    assert torch.equal(torch.cat(chunks, 1), expected)


@pytest.mark.parametrize("k", [3, 33])
def test_crawl_in_chunks_equals_whole(k):
    crawl = Crawl(4, k).double()
    crawl.logits.data += torch.randn(k)
    x = torch.randn(2, 200, 3, dtype=torch.float64)
    whole, _ = crawl(x)
    history, chunks = None, []
    for chunk in x.split([1, 1, 5, 70, 3, 120], dim=1):
        y, history = crawl(chunk, history)
        chunks.append(y)
    torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [3, 9])
def test_gradient(k):
    x = torch.randn(2, 12 + k - 1, 2, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(k, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, taps: correlate(x, taps, 12), (x, taps))


@pytest.mark.parametrize("K", [1, 3, 8])
@pytest.mark.parametrize("min_lag, T", [(1, 12), (4, 12), (6, 4)])
def test_a_compiled_step_filters_as_every_other_does(K, min_lag, T):
    """At the start of a text, where the signal may be shorter than the lags."""
    taps = torch.randn(K, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True)
    theirs = remember(x, None, min_lag + K - 1).filtered(taps, min_lag)
    ours = DelayedSum.apply(taps, x, min_lag)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (taps, x), grad),
        torch.autograd.grad(theirs, (taps, x), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("K", [1, 3, 33])
@pytest.mark.parametrize("min_lag, T", [(1, 12), (4, 40), (6, 4)])
def test_one_product_filters_and_subtracts(K, min_lag, T):
    taps = torch.randn(K, dtype=torch.float64, requires_grad=True)
    x, y = (torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    past = remember(x, None, min_lag + K - 1).filtered(taps, min_lag)
    assert gradcheck(lambda *inputs: FilterLess.apply(*inputs, min_lag, 0.7), (taps, x, y))
    ours = FilterLess.apply(taps, x, y, min_lag, 0.7)
    torch.testing.assert_close(ours, 0.7 * (past - y), rtol=1e-12, atol=1e-12)


def test_what_is_written_is_read_and_not_worked_out_again():
    torch.compiler.reset()

    def shifts(x, keep):
        y = keep(x.exp())
        return sum(torch.nn.functional.pad(y[:, lag:], (0, lag)) for lag in range(3))

    x = torch.randn(5, 7).mT  # whose strides are not those of its result
    codes = []
    for keep in (written, torch.clone):
        compiled = torch.compile(shifts, fullgraph=True)
        found, (code,) = run_and_get_code(compiled, x, keep)
        torch.testing.assert_close(found, shifts(x, torch.clone))
        codes.append(code)
    assert codes[0].count("exp(") < codes[1].count("exp(")
