"""Causal running mean μ_t = mean(x_0, …, x_t) of a signal, in one scan."""

from typing import NamedTuple

import torch
from torch import Tensor

from wavelet_lm.transforms.ring import Ring


class RunningMeanState(NamedTuple):
    """What the mean remembers of a text: `total` [B, C] (at least float32), `count` [B] int64."""

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.count[:, None]


def running_mean(
    x: Tensor, state: RunningMeanState | Ring | None = None
) -> tuple[Tensor, RunningMeanState | Ring]:
    """Mean of everything up to and including each position.

    Args:
        x: [B, T, C], the signal or its next chunk.
        state: what an earlier call returned, or a ring of the totals; None starts a text.

    Returns:
        The means [B, T, C] in x's dtype, and the state after the last position. Sums are
        accumulated in float32 (float64 for float64 input).
    """
    B, T, C = x.shape
    x_wide = wide(x)
    if state is None:
        state = RunningMeanState(
            x_wide.new_zeros(B, C), torch.zeros(B, dtype=torch.int64, device=x.device)
        )
    if isinstance(state, Ring):
        totals = state.delayed(1, 1) + x_wide.cumsum(1)
        counts = count_from(state.clock.position, T)
        state.write(totals)
    else:
        totals = state.total[:, None] + x_wide.cumsum(1)
        counts = count_from(state.count, T)
        state = RunningMeanState(totals[:, -1], state.count + T)
    return (totals / counts[..., None]).to(x.dtype), state


def wide(x: Tensor) -> Tensor:
    """x in the dtype that sums are taken in: float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def count_from(count: Tensor, T: int) -> Tensor:
    """[B, T]: how many positions there are up to each of the next T, after `count` [B]."""
    return count[:, None] + torch.arange(1, T + 1, device=count.device)
