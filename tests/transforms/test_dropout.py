"""Dropout by hashes, which a compiled step on a GPU has in place of a stored mask."""

import pytest
import torch
from torch.autograd import gradcheck

from wavelet_lm.transforms import dropout
from wavelet_lm.transforms.dropout import (
    Dropout,
    HashedDropout,
    HashedDropoutTimes,
    dropped,
    hashed,
    mask,
    random_numbers,
)

N, C = 2000, 512


def numbers(seed: int = 0, n: int = N, c: int = C) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return random_numbers(torch.empty(n, c))


def in_python(x: int) -> int:
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    return (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF


def test_hashes_are_those_of_whole_numbers():
    x = torch.tensor([0, 1, 2, 12345, -1, -5, 2**31 - 1, -(2**31)], dtype=torch.int32)
    assert [h & 0xFFFFFFFF for h in hashed(x).tolist()] == [in_python(v) for v in x.tolist()]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_a_mask_is_as_good_as_independent_draws(p):
    m = mask(*numbers(), p).double() - (1 - p)
    deviation = (p * (1 - p)) ** 0.5
    for dim in (0, 1, (0, 1)):  # means of columns, rows and all, in their standard deviations
        n = m.numel() if dim == (0, 1) else m.shape[dim]
        z = m.mean(dim) / (deviation / n**0.5)
        assert z.abs().max() < 5
        assert z.numel() == 1 or z.std() == pytest.approx(1, abs=0.1)
    for rows, columns in ((0, 1), (1, 0), (1, 1), (7, 3)):  # neighbours tell nothing of each other
        pairs = m[rows:, columns:] * m[: N - rows, : C - columns]
        assert abs(pairs.mean() / (deviation**2 / pairs.numel() ** 0.5)) < 5


def test_masks_of_two_steps_have_nothing_in_common():
    both = [mask(*numbers(seed), 0.5).double() - 0.5 for seed in (0, 1)]
    assert abs((both[0] * both[1]).mean() / (0.25 / (N * C) ** 0.5)) < 5


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_or_everything_is_dropped_at_the_ends(p):
    assert mask(*numbers(n=50, c=30), p).double().mean() == 1 - p


def test_the_compiler_makes_the_same_mask():
    compiled = torch.compile(lambda *x: mask(*x, 0.3))
    assert torch.equal(compiled(*numbers(n=64, c=48)), mask(*numbers(n=64, c=48), 0.3))


def test_what_is_kept_keeps_its_mean_and_what_is_dropped_has_no_gradient():
    x = torch.rand(N, C, dtype=torch.float64, requires_grad=True)
    y = HashedDropout.apply(x, *numbers(), 0.2)
    m = mask(*numbers(), 0.2)
    torch.testing.assert_close(y, torch.where(m, x / 0.8, 0))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, m.double() / 0.8)


def test_gradients():
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(3, dtype=torch.float64, requires_grad=True)
    rows, columns = numbers(n=12, c=5)
    assert gradcheck(lambda x: HashedDropout.apply(x, rows, columns, 0.4), (x,))
    assert gradcheck(lambda *x: HashedDropoutTimes.apply(*x, rows, columns, 0.4), (x, factors))
    expected = dropped(x, rows, columns, 0.4) * factors[:, None, None]
    got = HashedDropoutTimes.apply(x, factors, rows, columns, 0.4)
    torch.testing.assert_close(got, expected)


def test_elsewhere_it_is_pytorchs():
    x, layer = torch.randn(3, 7), Dropout(0.5)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    assert torch.equal(y, torch.nn.functional.dropout(x, 0.5))
    torch.manual_seed(0)
    factors = torch.arange(3.0)
    assert torch.equal(layer.times(x, factors), y * factors[:, None])
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False), (1.0, True)])
def test_a_step_draws_no_numbers_that_it_does_not_need(p, training, monkeypatch):
    monkeypatch.setattr(dropout, "in_gpu_step", lambda x: True)
    monkeypatch.setattr(dropout, "random_numbers", lambda x: pytest.fail("drawn"))
    layer, x = Dropout(p).train(training), torch.randn(3, 7)
    torch.testing.assert_close(layer(x), torch.zeros_like(x) if p == 1 else x)
