"""Causal means of a signal: of everything so far, of the last N positions, and a learned one.

Each is called as `mean, state = average(x, state)` on a signal [B, T, C] or its next chunk. Sums
are taken in float32 at least.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wavelet_lm.transforms.dtypes import in_gpu_step, wide
from wavelet_lm.transforms.history import Clock, Ring, carried, counted, remember


class RunningMeanState(NamedTuple):
    """What the mean remembers of a text: `total` [B, C] (at least float32), `count` [B] int64."""

    total: Tensor | Ring
    count: Tensor | Clock

    @property
    def mean(self) -> Tensor:
        """The mean of the text so far, [B, C]."""
        return self.total / self.count[:, None]


def running_mean(
    x: Tensor, state: RunningMeanState | None = None
) -> tuple[Tensor, RunningMeanState]:
    """μ_t = mean(x_0, …, x_t): of everything up to and with each position, in one scan.

    Args:
        x: [B, T, C], the signal or its next chunk.
        state: what an earlier call returned; None starts a text.

    Returns:
        The means [B, T, C] in x's dtype, and the state after the last position. Sums are
        accumulated in float32 (float64 for float64 input).

    Examples:
        >>> x = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 4, 1)  # [B, T, C]
        >>> means, state = running_mean(x)
        >>> means.flatten().tolist()
        [1.0, 2.0, 3.0, 4.0]
        >>> means, state = running_mean(torch.full((1, 1, 1), 9.0), state)  # the next chunk
        >>> means.item(), state.count.item()
        (5.0, 5)
    """
    B, T, C = x.shape
    x_wide = wide(x)
    is_start = state is None
    if is_start:
        state = RunningMeanState(x_wide.new_zeros(B, C), _no_positions(x))
    scan, count = carried(state.total), counted(state.count)
    totals = scan.before()[:, None] + x_wide.cumsum(1)
    means = (totals / count.up_to(T)[..., None]).to(x.dtype)
    if is_start and in_gpu_step(x):  # where the last one is all that would be kept of the totals
        return means, RunningMeanState(x_wide.sum(1), count.after(T))
    return means, RunningMeanState(scan.after(totals), count.after(T))


class WindowedMeanState(NamedTuple):
    """`history` [B, N − 1, C] (at least float32, zeros before the text) and `count` [B] int64."""

    history: Tensor | Ring
    count: Tensor | Clock


class WindowedMean:
    """μ_t = mean(x_{t−N+1}, …, x_t); of fewer positions at the start of a text.

    For the first N positions it equals the running mean. The sum is taken anew at every position,
    never by subtracting what falls out of the window, whose rounding errors would add up.
    """

    def __init__(self, N: int):
        self.N = N
        self._taps = torch.ones(0)

    def __call__(
        self, x: Tensor, state: WindowedMeanState | None = None
    ) -> tuple[Tensor, WindowedMeanState]:
        """Means [B, T, C] of x [B, T, C], a signal or its next chunk, in x's dtype; the state."""
        T, x_wide = x.shape[1], wide(x)
        history, before = (None, _no_positions(x)) if state is None else state
        signal, count = remember(x_wide, history, self.N - 1), counted(before)
        sums = signal.filtered(self._ones(x_wide))
        n = count.up_to(T).clamp(max=self.N)
        state = WindowedMeanState(signal.state, count.after(T))
        return (sums / n[..., None]).to(x.dtype), state

    def _ones(self, like: Tensor) -> Tensor:
        """The taps, one tensor for every call: what a clock makes of it once serves all steps."""
        if torch.compiler.is_compiling():
            return like.new_ones(self.N)
        if len(self._taps) == 0 or (self._taps.dtype, self._taps.device) != (
            like.dtype,
            like.device,
        ):
            self._taps = like.new_ones(self.N)
        return self._taps


class ExponentialMeanState(NamedTuple):
    """Weighted sum and sum of weights of a text so far, each [B, C], at least float32."""

    total: Tensor | Ring
    weight: Tensor | Ring

    @property
    def mean(self) -> Tensor:
        """The mean of the text so far, [B, C]."""
        return self.total / self.weight


# From σ(−104) on a weight is zero in float32; where all are, their mean is 0 / 0.
MOST_DECAY = 80.0


class ExponentialMean(nn.Module):
    """μ_t = α_t μ_{t−1} + (1 − α_t) x_t with α = σ(A x + b) per channel.

    A linear recurrence with a decay that the input chooses. It starts from nothing and not from
    zero: like Adam's moments it is divided by the recurrence of the weights themselves, so that
    μ_0 = x_0. 1 − α is σ(−(A x + b)), in float32, since in half precision it vanishes for slow
    decays.
    """

    def __init__(self, C: int):
        super().__init__()
        self.decay = nn.Linear(C, C)

    def forward(
        self, x: Tensor, state: ExponentialMeanState | None = None
    ) -> tuple[Tensor, ExponentialMeanState]:
        """Means [B, T, C] of x [B, T, C], a signal or its next chunk, and the state after it."""
        decay = wide(self.decay(x)).clamp(max=MOST_DECAY)
        wide_x = x.to(decay.dtype)
        if state is None:
            state = ExponentialMeanState(*wide_x.new_zeros(2, *x[:, 0].shape))
        scans = [carried(part) for part in state]
        keep, take = decay.sigmoid(), (-decay).sigmoid()
        inputs = torch.stack((take * wide_x, take))
        before = torch.stack([scan.before() for scan in scans])
        totals, weights = linear_recurrence(keep, inputs, before)
        state = ExponentialMeanState(scans[0].after(totals), scans[1].after(weights))
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


def _no_positions(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)
