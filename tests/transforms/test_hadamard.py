import math

import pytest
import scipy.linalg
import torch
from torch.autograd import gradcheck

from wavelet_lm.transforms.hadamard import (
    HadamardTransform,
    _ScaledInProduct,
    hadamard_transform,
)

WIDTHS = [1, 2, 4, 16, 64, 128, 256, 512, 2048]


def scipy_matrix(n: int) -> torch.Tensor:
    return torch.from_numpy(scipy.linalg.hadamard(n)).double() / math.sqrt(n)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("make", [lambda n: hadamard_transform, HadamardTransform])
def test_equals_scipy(n, make):
    x = torch.randn(3, 2, n, dtype=torch.float64)
    torch.testing.assert_close(make(n)(x), x @ scipy_matrix(n), rtol=0, atol=1e-12)


def scaled_in_product(x):
    """As a compiled step on a GPU takes it."""
    return _ScaledInProduct.apply(
        x, False, *(f.to(x.dtype) for f in HadamardTransform(x.shape[-1]).buffers())
    )


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 3, 2)])
def test_a_scale_within_the_product_is_the_same(n, shape):
    x = torch.randn(*shape, n, dtype=torch.float64, requires_grad=True)
    y = scaled_in_product(x)
    torch.testing.assert_close(y, x @ scipy_matrix(n), rtol=0, atol=1e-12)
    g = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(grad, g @ scipy_matrix(n), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("in_product", [False, True])
def test_columns_are_those_of_the_transposed(n, in_product):
    H = HadamardTransform(n)
    x = torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True)
    factors = [f.to(x.dtype) for f in H.buffers()]
    y = _ScaledInProduct.apply(x, True, *factors) if in_product else H.of_columns(x)
    torch.testing.assert_close(y, scipy_matrix(n) @ x, rtol=0, atol=1e-12)
    g = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(grad, scipy_matrix(n) @ g, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", WIDTHS)
def test_is_its_own_inverse(n):
    H = HadamardTransform(n)
    x = torch.randn(5, n, dtype=torch.float64)
    torch.testing.assert_close(H(H(x)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeps_the_dtype_and_is_accurate_in_it(dtype):
    x = torch.randn(4, 256, dtype=torch.float64)
    y = HadamardTransform(256)(x.to(dtype))
    assert y.dtype == dtype
    error = (y.double() - x @ scipy_matrix(256)).abs().max()
    assert error < 8 * torch.finfo(dtype).eps


def test_runs_in_float32_under_autocast():
    H = HadamardTransform(64)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = H(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, H(x), rtol=0, atol=0)


@pytest.mark.parametrize("n", [0, 3, 48])
def test_refuses_other_widths(n):
    with pytest.raises(ValueError, match="power of two"):
        HadamardTransform(n)


def test_gradient():
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(HadamardTransform(8), x)
