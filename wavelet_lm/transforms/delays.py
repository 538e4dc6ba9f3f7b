"""Causal delays: the plain shift of the à trous wavelet, and the learned mixture of lags (crawl).

All are called as `past, history = delay(x, history)`; the history (`history.py`) is that of the
last `max_lag` positions of the signal, [B, max_lag, C]; None: nothing came before (zeros).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wavelet_lm.transforms.history import Ring, Signal, remember


class Shift(nn.Module):
    """shift_o(x)_t = x_{t−o}, zero before the text."""

    def __init__(self, lag: int):
        super().__init__()
        self.max_lag = lag

    def forward(
        self, x: Tensor, history: Tensor | Ring | None = None
    ) -> tuple[Tensor, Tensor | Ring]:
        """[B, T, C] -> the same shape, and the history after it."""
        signal = remember(x, history, self.max_lag)
        return self.past(signal), signal.state

    def past(self, signal: Signal) -> Tensor:
        """What the delay gives for the next positions of a signal: [B, T, C]."""
        return signal.delayed(self.max_lag)


class CausalFilter(nn.Module):
    """Σ_o taps_o · x_{t−o} over consecutive lags o = m … m + K − 1, the same for every channel.

    Attributes:
        min_lag, max_lag: the first and the last of the lags; a subclass gives `taps`.
    """

    min_lag: int
    max_lag: int

    def taps(self) -> Tensor:
        """[K], the smallest lag first."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, history: Tensor | Ring | None = None
    ) -> tuple[Tensor, Tensor | Ring]:
        """[B, T, C] -> the same shape, and the history after it."""
        signal = remember(x, history, self.max_lag)
        return self.past(signal), signal.state

    def past(self, signal: Signal) -> Tensor:
        """What the filter gives for the next positions of a signal: [B, T, C]."""
        return signal.filtered(self.taps(), self.min_lag)


class Filter(CausalFilter):
    """A filter of given taps [K], the smallest lag first, which is `min_lag` ≥ 1."""

    def __init__(self, taps: Tensor, min_lag: int):
        super().__init__()
        self.min_lag, self.max_lag = min_lag, min_lag + len(taps) - 1
        self.register_buffer("fixed_taps", taps, persistent=False)

    def taps(self) -> Tensor:
        return self.fixed_taps


class Crawl(CausalFilter):
    """Σ_j softmax(θ)_j · x_{t−o_j} over K consecutive lags around 2^level.

    The lags are o_j = m … m + K − 1 with m = max(1, 2^level − ⌊K/2⌋); θ starts at 0 but 5 at the
    lag 2^level, so that the mixture starts near the plain shift.
    """

    def __init__(self, level: int, k: int):
        super().__init__()
        center = 2**level
        self.min_lag = max(1, center - k // 2)
        self.max_lag = self.min_lag + k - 1
        logits = torch.zeros(k)
        logits[center - self.min_lag] = 5.0
        self.logits = nn.Parameter(logits)

    def taps(self) -> Tensor:
        """[K], the smallest lag first; they sum to 1."""
        return self.logits.softmax(0)
