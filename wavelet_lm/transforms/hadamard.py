"""Orthonormal fast Walsh–Hadamard transform over the last dimension.

    H_1 = [1],   H_2n = 1/√2 [[H_n, H_n], [H_n, −H_n]]      (Sylvester's order)

H is symmetric and its own inverse. `hadamard_transform` is the definition, the textbook butterfly;
`HadamardTransform` is what runs: since H_mn = H_m ⊗ H_n, a few small matrix products do the work of
log2(n) passes over memory.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from wavelet_lm.transforms.dtypes import without_autocast

# Largest Kronecker factor: small enough that its product stays memory-bound on a GPU, and large
# enough that every width up to 16,384 takes two products.
MAX_FACTOR = 128


def hadamard_transform(x: Tensor) -> Tensor:
    """H x over the last dimension of `x` [..., n], n a power of two, by butterflies."""
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"the Hadamard transform needs a power of two, not {n}")
    shape = x.shape
    half = 1
    while half < n:
        a, b = x.reshape(*shape[:-1], n // (2 * half), 2, half).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2)
        half *= 2
    return x.reshape(shape) / math.sqrt(n)


class HadamardTransform(nn.Module):
    """`hadamard_transform` for one width `n`, as products with Kronecker factors of H.

    The factors hold ±1, which every floating type represents exactly; the scale 1/√n is applied
    once at the end. Runs in the input's own dtype, autocast or not, so that float32 weights are
    rotated in float32.

    Examples:
        >>> rotate = HadamardTransform(4)
        >>> rotate(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
        >>> x = torch.randn(2, 10, 4)
        >>> torch.allclose(rotate(rotate(x)), x, atol=1e-6)  # its own inverse
        True
    """

    def __init__(self, n: int):
        super().__init__()
        if n < 1 or n & (n - 1):
            raise ValueError(f"the Hadamard transform needs a power of two, not {n}")
        self.n = n
        bits = n.bit_length() - 1
        n_factors = max(1, -(-bits // (MAX_FACTOR.bit_length() - 1)))
        self.sizes = [1 << (bits // n_factors + (i < bits % n_factors)) for i in range(n_factors)]
        for i, size in enumerate(self.sizes):
            factor = hadamard_transform(torch.eye(size)) * math.sqrt(size)
            self.register_buffer(f"factor_{i}", factor.round(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """H x over the last dimension: [..., n] -> [..., n], dtype kept."""
        factors = [getattr(self, f"factor_{i}").to(x.dtype) for i in range(len(self.sizes))]
        with without_autocast(x):
            if torch.compiler.is_compiling() and x.is_cuda:
                return _ScaledInProduct.apply(x, False, *factors)
            return _products(x, factors, _product) * (1 / math.sqrt(self.n))

    def of_columns(self, x: Tensor) -> Tensor:
        """H x over the last dimension but one: [..., n, m] -> [..., n, m], dtype kept."""
        factors = [getattr(self, f"factor_{i}").to(x.dtype) for i in range(len(self.sizes))]
        with without_autocast(x):
            if torch.compiler.is_compiling() and x.is_cuda:
                return _ScaledInProduct.apply(x, True, *factors)
            return _columns(x, factors, _product_of_columns) * (1 / math.sqrt(self.n))

    def extra_repr(self) -> str:
        return f"{self.n}"


class _ScaledInProduct(torch.autograd.Function):
    """The transform with its scale in the last product: a GPU's library multiplies what it adds up
    by a number before it is rounded, and a pass over the result is spared, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor, of_columns: bool, *factors: Tensor) -> Tensor:
        """[..., n], or [..., n, m] `of_columns` -> the same shape."""
        ctx.save_for_backward(*factors)
        ctx.of_columns = of_columns
        return _scaled(x, of_columns, factors)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """H is symmetric: as `forward`."""
        factors = ctx.saved_tensors
        return _scaled(grad, ctx.of_columns, factors), None, *[None] * len(factors)


def _scaled(x: Tensor, of_columns: bool, factors: Sequence[Tensor]) -> Tensor:
    if of_columns:
        return _columns(x, factors, _scaled_columns)
    if len(factors) == 1 and x.ndim == 3:  # what reads it may have it written in its place
        each = factors[0].expand(len(x), -1, -1)
        return torch.baddbmm(x, x, each, beta=0, alpha=1 / math.sqrt(x.shape[-1]))
    return _products(x, factors, _scaled_product)


def _products(
    x: Tensor, factors: Sequence[Tensor], last: Callable[[Tensor, Tensor, int], Tensor]
) -> Tensor:
    """x [..., n] with every factor along its part of n; `last` takes rows, a factor and n."""
    shape = x.shape
    inner = shape[-1]
    for factor in factors[:-1]:
        inner //= len(factor)
        x = factor @ x.reshape(-1, len(factor), inner)
    return last(x.reshape(-1, inner), factors[-1], shape[-1]).reshape(shape)


def _columns(
    x: Tensor, factors: Sequence[Tensor], last: Callable[[Tensor, Tensor, int], Tensor]
) -> Tensor:
    """x [..., n, m] with every factor along its part of n; `last` takes a factor, columns and n."""
    shape = x.shape
    inner = math.prod(shape[-2:])
    for factor in factors[:-1]:
        inner //= len(factor)
        x = factor @ x.reshape(-1, len(factor), inner)
    columns = x.reshape(-1, len(factors[-1]), shape[-1])
    return last(factors[-1], columns, shape[-2]).reshape(shape)


def _product(rows: Tensor, factor: Tensor, n: int) -> Tensor:
    return rows @ factor


def _scaled_product(rows: Tensor, factor: Tensor, n: int) -> Tensor:
    # Of what is added to the product, nothing.
    return torch.addmm(factor[0], rows, factor, beta=0, alpha=1 / math.sqrt(n))


def _product_of_columns(factor: Tensor, columns: Tensor, n: int) -> Tensor:
    return factor @ columns


def _scaled_columns(factor: Tensor, columns: Tensor, n: int) -> Tensor:
    factors = factor.expand(len(columns), -1, -1)
    return torch.baddbmm(columns, factors, columns, beta=0, alpha=1 / math.sqrt(n))
