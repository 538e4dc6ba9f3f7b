"""Learned exponential mean of a signal: a linear recurrence with input-dependent decay."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wavelet_lm.transforms.ring import Ring


class ExponentialMeanState(NamedTuple):
    """Weighted sum and sum of weights of a text so far, each [B, C], at least float32."""

    total: Tensor
    weight: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.weight


class ExponentialMean(nn.Module):
    """μ_t = α_t μ_{t−1} + (1 − α_t) x_t with α = σ(A x + b) per channel.

    The recurrence starts from nothing and not from zero: like Adam's moments it is divided by the
    recurrence of the weights themselves, so that μ_0 = x_0. 1 − α is σ(−(A x + b)), in float32,
    since in half precision it vanishes for slow decays.
    """

    def __init__(self, C: int):
        super().__init__()
        self.decay = nn.Linear(C, C)

    def forward(
        self, x: Tensor, state: ExponentialMeanState | Ring | None = None
    ) -> tuple[Tensor, ExponentialMeanState | Ring]:
        """Means [B, T, C] of x [B, T, C], a signal or its next chunk, and the state after it.

        The state may be a ring of the totals and weights side by side.
        """
        decay = self.decay(x)
        if decay.dtype != torch.float64:
            decay = decay.float()
        wide = x.to(decay.dtype)
        if state is None:
            state = ExponentialMeanState(*wide.new_zeros(2, *x[:, 0].shape))
        before = state.delayed(1, 1)[:, 0].chunk(2, -1) if isinstance(state, Ring) else state
        keep, take = decay.sigmoid(), (-decay).sigmoid()
        inputs = torch.stack((take * wide, take))
        totals, weights = linear_recurrence(keep, inputs, torch.stack(tuple(before)))
        if isinstance(state, Ring):
            state.write(torch.cat((totals, weights), -1))
        else:
            state = ExponentialMeanState(totals[:, -1], weights[:, -1])
        return (totals / weights).to(x.dtype), state


def linear_recurrence(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    """y_t = a_t y_{t−1} + b_t from y_{−1} = `initial`, by recursive doubling.

    Args:
        a: [B, T, C], between 0 and 1; b: [..., B, T, C]; initial: [..., B, C].

    Returns:
        [..., B, T, C]; log2(T) passes, each over the whole signal.
    """
    step, T = 1, a.shape[1]
    while step < T:
        # Compose every prefix with the one `step` positions before it; the first ones are done.
        b = torch.cat((b[..., :step, :], b[..., step:, :] + a[:, step:] * b[..., :-step, :]), -2)
        a = torch.cat((a[:, :step], a[:, step:] * a[:, :-step]), 1)
        step *= 2
    return b + a * initial[..., None, :]
