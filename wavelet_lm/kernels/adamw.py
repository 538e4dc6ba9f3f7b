"""AdamW's step, as its Triton kernel computes it in one pass (Loshchilov and Hutter, 2019).

With g the gradient over `divisor` (the loss scale, and what clips), of each weight w, its moments m
and v, and t the number of the step:

    m ← m + (1 − β₁) (g − m);  v ← β₂ v + (1 − β₂) g²
    w ← (1 − lr · decay) w − lr · (m / (1 − β₁ᵗ)) / (√v / √(1 − β₂ᵗ) + eps)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rates(NamedTuple):
    """What a step is the same with for all weights."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


def corrections(steps: Sequence[Tensor], betas: tuple[float, float]) -> Tensor:
    """1 − β₁ᵗ and √(1 − β₂ᵗ) of every weight, float32 [n, 2], for steps t of n 0-d float32."""
    t = torch.stack(list(steps)).double()  # near 1, a power in float32 leaves few digits
    beta1, beta2 = betas
    return torch.stack([1 - beta1**t, (1 - beta2**t).sqrt()], 1).float()


def adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    steps: Sequence[Tensor],
    rates: Rates,
    divisor: Tensor | None = None,
    skip: Tensor | None = None,
    copies: Sequence[Tensor | None] | None = None,
) -> None:
    """The step in place, tensor by tensor: what defines the kernel, and stands in for it.

    All lists: one shape for each weight; weights and moments of one floating dtype, gradients of it
    or of half precision.

    Args:
        firsts, seconds: the moments m and v.
        steps: 0-d float32, the number of this step, from 1 on; it is not changed.
        divisor, skip, copies: as for `adagrad_`.
    """
    lr, decay, (beta1, beta2), eps = rates
    copies = copies or [None] * len(weights)
    corrected = corrections(steps, rates.betas)
    rows = zip(weights, gradients, firsts, seconds, corrected, copies, strict=True)
    for w, g, m, v, (of_m, of_v), copy in rows:
        g = g.to(w.dtype)
        if divisor is not None:
            g = g / divisor
        new_m = m + (1 - beta1) * (g - m)
        new_v = beta2 * v + (1 - beta2) * g * g
        step = lr / of_m * new_m / (new_v.sqrt() / of_v + eps)
        new = [(1 - lr * decay) * w - step, new_m, new_v]
        if skip is not None:
            new = [torch.where(skip != 0, x, y) for x, y in zip((w, m, v), new, strict=True)]
        for x, y in zip((w, m, v), new, strict=True):
            x.copy_(y)
        if copy is not None:
            copy.copy_(w)
