"""In which dtype something is computed, under autocast and without."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


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
