"""Adagrad's step, as its Triton kernel computes it in one pass over weights, gradients and sums.

With g the gradient over `divisor` (the loss scale, and what clips), of each weight w and sum s:

    coupled     g ← g + decay · w;  s ← s + g²;  w ← w − lr · g / (√s + eps)
    decoupled   s ← s + g²;  w ← w − lr · (g / (√s + eps) + decay · w)

Coupled decay is divided by the same root as the gradient: a weight without a gradient moves by
nearly lr towards zero in its first step, however small the decay is. Decoupled, it shrinks by
lr · decay of itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rates(NamedTuple):
    """What a step is the same with for all weights."""

    lr: float
    weight_decay: float
    decoupled: bool
    eps: float


def adagrad_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    sums: Sequence[Tensor],
    rates: Rates,
    divisor: Tensor | None = None,
    skip: Tensor | None = None,
    copies: Sequence[Tensor | None] | None = None,
) -> None:
    """The step in place, tensor by tensor: what defines the kernel, and stands in for it.

    All lists: one shape for each weight; weights and sums of one floating dtype, gradients of it
    or of half precision.

    Args:
        divisor: 0-d float32, of all gradients; None = 1.
        skip: 0-d float32; where it is not 0, nothing changes, whatever the gradients are.
        copies: of each weight one of another dtype, which is written too; None where there is none.
    """
    lr, decay, decoupled, eps = rates
    copies = copies or [None] * len(weights)
    for w, g, s, copy in zip(weights, gradients, sums, copies, strict=True):
        g = g.to(w.dtype)
        if divisor is not None:
            g = g / divisor
        if decay and not decoupled:
            g = g + decay * w
        new_s = s + g * g
        step = g / (new_s.sqrt() + eps)
        if decay and decoupled:
            step = step + decay * w
        new_w = w - lr * step
        if skip is not None:
            new_w, new_s = torch.where(skip != 0, w, new_w), torch.where(skip != 0, s, new_s)
        w.copy_(new_w)
        s.copy_(new_s)
        if copy is not None:
            copy.copy_(new_w)


def decay_(weights: Sequence[Tensor], amount: float, skip: Tensor | None = None) -> None:
    """w ← w − amount · w, for optimizers that have no decoupled decay of their own.

    Args:
        weights: of any shapes, one device and dtype.
        skip: as for `adagrad_`.
    """
    kept = 1 - amount if skip is None else 1 - amount * (skip == 0)
    torch._foreach_mul_(list(weights), kept)
