"""Causal mean of the last N positions of a signal, exact however long it is."""

from typing import NamedTuple

import torch
from torch import Tensor

from wavelet_lm.transforms.crawl import correlate, extend
from wavelet_lm.transforms.ring import Ring
from wavelet_lm.transforms.running_mean import count_from, wide


class WindowedMeanState(NamedTuple):
    """`history` [B, N − 1, C] (at least float32, zeros before the text) and `count` [B] int64."""

    history: Tensor
    count: Tensor


class WindowedMean:
    """μ_t = mean(x_{t−N+1}, …, x_t); of fewer positions at the start of a text.

    For the first N positions it equals the running mean. The sum is taken anew at every position,
    never by subtracting what falls out of the window, whose rounding errors would add up.
    """

    def __init__(self, N: int):
        self.N = N

    def __call__(
        self, x: Tensor, state: WindowedMeanState | Ring | None = None
    ) -> tuple[Tensor, WindowedMeanState | Ring]:
        """Means [B, T, C] of x [B, T, C], a signal or its next chunk, in x's dtype; the state."""
        T, x_wide = x.shape[1], wide(x)
        if isinstance(state, Ring):
            state.write(x_wide)
            lags = torch.arange(state.size, device=x.device)
            sums = state.filtered((lags < self.N).to(x_wide.dtype), T)
            counts = count_from(state.clock.position, T)
        else:
            history, count = (None, None) if state is None else state
            extended = extend(x_wide, history, self.N - 1)
            sums = correlate(extended, x_wide.new_ones(self.N), T)
            if count is None:
                count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            state = WindowedMeanState(extended[:, T:], count + T)
            counts = count_from(count, T)
        return (sums / counts.clamp(max=self.N)[..., None]).to(x.dtype), state
