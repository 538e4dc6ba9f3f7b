"""In which dtype something is computed, under autocast and without, and in which form."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def in_gpu_step(x: Tensor) -> bool:
    """Whether x, of any shape, is part of a compiled training step on a GPU.

    There the compiler decides what is written and read again, and some expressions have a form of
    their own that spares it passes over memory.
    """
    return torch.compiler.is_compiling() and x.is_cuda and torch.is_grad_enabled()


def by_row(factors: Tensor, x: Tensor) -> Tensor:
    """Factors [...], one for each of the first parts of x [..., rows, C], in a shape to multiply x.

    In a compiled step on a GPU that is [..., rows, 1]: their gradient is then a sum over each row,
    which the compiler takes where x's gradient is made, and a sum of these few; else it writes the
    product of x and its gradient, and reads it.
    """
    if factors.ndim:
        factors = factors.reshape(*factors.shape, *[1] * (x.ndim - factors.ndim))
    if in_gpu_step(x):
        return factors.expand(*x.shape[:-1], 1)
    return factors


def wide(x: Tensor) -> Tensor:
    """x of any shape in the dtype that sums are taken in: float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def as_factor(x: Tensor) -> Tensor:
    """x of any shape in the dtype in which autocast would multiply it."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def as_summand(x: Tensor) -> Tensor:
    """x of any shape in float32 where autocast makes half precision of it, else as it is."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return wide(x)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Products in x's own dtype, x of any shape, where autocast would take another."""
    # The meta device has no autocast, and where there is none it is no part of an exported graph.
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
