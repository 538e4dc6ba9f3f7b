"""Causal running mean μ_t = mean(x_0, …, x_t) of a signal, in one scan."""

from typing import NamedTuple

import torch
from torch import Tensor


class RunningMeanState(NamedTuple):
    """What the mean remembers of a text: `total` [B, C] (at least float32), `count` [B] int64."""

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.count[:, None]


def running_mean(
    x: Tensor, state: RunningMeanState | None = None
) -> tuple[Tensor, RunningMeanState]:
    """Mean of everything up to and including each position.

    Args:
        x: [B, T, C], the signal or its next chunk.
        state: what an earlier call returned; None starts a text.

    Returns:
        The means [B, T, C] in x's dtype, and the state after the last position. Sums are
        accumulated in float32 (float64 for float64 input).
    """
    B, T, C = x.shape
    wide = x if x.dtype == torch.float64 else x.float()
    if state is None:
        state = RunningMeanState(
            wide.new_zeros(B, C), torch.zeros(B, dtype=torch.int64, device=x.device)
        )
    totals = state.total[:, None] + wide.cumsum(1)
    counts = state.count[:, None] + torch.arange(1, T + 1, device=x.device)
    means = (totals / counts[..., None]).to(x.dtype)
    return means, RunningMeanState(totals[:, -1], state.count + T)
