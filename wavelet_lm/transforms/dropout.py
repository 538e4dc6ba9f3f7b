"""Dropout whose mask a GPU makes again in the backward pass, and does not keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.transforms.dtypes import by_row, in_gpu_step, wide


class Dropout(nn.Dropout):
    """x ⊙ m / (1 − p) in training, where a number of m is 0 with probability p and else 1.

    As PyTorch's, but for a compiled step on a GPU. There the compiler keeps a mask, a byte a
    number, since it makes nothing random twice. This mask is a hash of a random number of each row
    and one of each column, which are all that is kept: whatever reads x or its gradient works it
    out beside.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape."""
        if self._hashes(x):
            return HashedDropout.apply(x, *random_numbers(x), self.p)
        return super().forward(x)

    def times(self, x: Tensor, factors: Tensor) -> Tensor:
        """x [n, ..., C] after dropout, times factors [n] -> the same shape."""
        if self._hashes(x):
            return HashedDropoutTimes.apply(x, factors, *random_numbers(x), self.p)
        x = super().forward(x)
        return (x * by_row(factors, x)).to(x.dtype)

    def _hashes(self, x: Tensor) -> bool:
        return in_gpu_step(x) and self.training and 0 < self.p < 1


class HashedDropout(torch.autograd.Function):
    """x ⊙ m / (1 − p) with `mask` m, and the same of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, p: float) -> Tensor:
        """x [..., C], random numbers [N] and [C] in int32 -> x's shape."""
        ctx.save_for_backward(rows, columns)
        ctx.p = p
        return dropped(x, rows, columns, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """That of the result, of its shape -> that of x."""
        return dropped(grad, *ctx.saved_tensors, ctx.p), None, None, None


class HashedDropoutTimes(torch.autograd.Function):
    """f ⊙ x ⊙ m / (1 − p), which keeps x as it came, for its own gradient and that of f."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factors: Tensor, rows: Tensor, columns: Tensor, p: float
    ) -> Tensor:
        """x [n, ..., C], f [n], random numbers [N] and [C] in int32 -> x's shape."""
        ctx.save_for_backward(x, factors, rows, columns)
        ctx.p = p
        y = dropped(x, rows, columns, p) * factors.view(-1, *[1] * (x.ndim - 1))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """That of the result, of its shape -> those of x and f, in their shapes."""
        x, factors, *numbers = ctx.saved_tensors
        grad = dropped(grad, *numbers, ctx.p)
        # Over each row first, which the compiler does where it makes x's gradient.
        of_factors = (grad * x).sum(-1, dtype=wide(x).dtype).flatten(1).sum(1)
        of_x = grad * factors.view(-1, *[1] * (x.ndim - 1))
        return of_x.to(x.dtype), of_factors.to(factors.dtype), None, None, None


def random_numbers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows and of the columns of x [..., C], as many as they are, in int32."""
    limits, n_columns = torch.iinfo(torch.int32), x.shape[-1]
    rows, columns = (
        torch.randint(limits.min, limits.max, (n,), dtype=torch.int32, device=x.device)
        for n in (x.numel() // n_columns, n_columns)
    )
    return rows, columns


def dropped(x: Tensor, rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """x ⊙ m / (1 − p) for x [..., C] and the mask m of random numbers [N] and [C] in int32."""
    m = mask(rows, columns, p).view(x.shape)
    return torch.where(m, x * (1 / (1 - p)), 0)


def mask(rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """[N, C] in bool, each False with probability p, of random numbers [N] and [C] in int32."""
    limits = torch.iinfo(torch.int32)
    return hashed(rows[:, None] + columns) >= min(limits.max, limits.min + round(p * 2**32))


def hashed(x: Tensor) -> Tensor:
    """x in int32, of any shape, in another order of the 2^32 numbers: what was near lies apart.

    Shifts and odd factors are those that Wellons found to change bits with probabilities nearest ½
    ("Prospecting for Hash Functions", 2018: lowbias32). His last shift, which changes the last 16
    bits alone, is left out: what is asked for is whether a number is large.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        # Zeros come in from the left, and not the sign.
        x = (x ^ ((x >> shift) & (2 ** (32 - shift) - 1))) * factor
    return x
