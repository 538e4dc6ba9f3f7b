"""Causal delays: the plain shift of the à trous wavelet, and the learned mixture of lags (crawl).

Both are called as `past, history = delay(x, history)`; the history is the last `max_lag` positions
of the signal, [B, max_lag, C], or a `Ring` of them; None means that nothing came before (zeros).
"""

import torch
from torch import Tensor, nn

from wavelet_lm.transforms.ring import Ring

# Up to this many taps a sum of shifted views is quickest (and fuses into its neighbours under
# torch.compile); above, a banded product reads each position once per block instead of once a tap.
MAX_SHIFTED_TAPS = 8
BLOCK = 64


def correlate(x: Tensor, taps: Tensor, length: int) -> Tensor:
    """y_t = Σ_j taps_j · x_{t+j} for t = 0 … length − 1, the same taps for every channel.

    Args:
        x: [B, length + K − 1, C].
        taps: [K].

    Returns:
        [B, length, C]. Cost is linear in `length`.
    """
    K = taps.shape[0]
    if K <= MAX_SHIFTED_TAPS:
        return sum(taps[j] * x[:, j : j + length] for j in range(K))
    block = min(BLOCK, length)
    n_blocks = -(-length // block)
    x = nn.functional.pad(x, (0, 0, 0, n_blocks * block - length))
    # band[p, q] = taps[q − p]: one block of outputs from the positions that it can see.
    columns = torch.arange(block, device=x.device)[:, None] + torch.arange(K, device=x.device)
    band = taps.new_zeros(block, block + K - 1).scatter(1, columns, taps.expand(block, K))
    windows = x.unfold(1, block + K - 1, block)  # [B, n_blocks, C, block + K − 1], a view
    y = torch.matmul(band, windows.transpose(2, 3))  # [B, n_blocks, block, C]
    return y.reshape(x.shape[0], n_blocks * block, -1)[:, :length]


class Shift(nn.Module):
    """shift_o(x)_t = x_{t−o}, zero before the text."""

    def __init__(self, lag: int):
        super().__init__()
        self.max_lag = lag

    def forward(
        self, x: Tensor, history: Tensor | Ring | None = None
    ) -> tuple[Tensor, Tensor | Ring]:
        T = x.shape[1]
        if isinstance(history, Ring):
            history.write(x)
            return history.delayed(self.max_lag, T), history
        extended = extend(x, history, self.max_lag)
        return extended[:, :T], extended[:, T:]


class Filter(nn.Module):
    """Σ_o taps_o · x_{t−o} over consecutive lags o = m … m + K − 1, the same for every channel.

    Args:
        taps: [K], the smallest lag first.
        min_lag: m, at least 1.
    """

    def __init__(self, taps: Tensor, min_lag: int):
        super().__init__()
        self.min_lag, self.max_lag = min_lag, min_lag + len(taps) - 1
        self.register_buffer("taps", taps, persistent=False)

    def forward(
        self, x: Tensor, history: Tensor | Ring | None = None
    ) -> tuple[Tensor, Tensor | Ring]:
        return apply_filter(self.taps, self.min_lag, x, history)


class Crawl(nn.Module):
    """Σ_j softmax(θ)_j · x_{t−o_j} over K consecutive lags around 2^level.

    The lags are o_j = m … m + K − 1 with m = max(1, 2^level − ⌊K/2⌋); θ starts at 0 but 5 at the
    lag 2^level, so that the mixture starts near the plain shift. It is a causal FIR filter with
    one kernel for all channels.
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

    def forward(
        self, x: Tensor, history: Tensor | Ring | None = None
    ) -> tuple[Tensor, Tensor | Ring]:
        return apply_filter(self.taps(), self.min_lag, x, history)


def apply_filter(
    taps: Tensor, min_lag: int, x: Tensor, history: Tensor | Ring | None
) -> tuple[Tensor, Tensor | Ring]:
    """Σ_j taps_j · x_{t−min_lag−j} for x [B, T, C], and the history after it."""
    T, K = x.shape[1], len(taps)
    if isinstance(history, Ring):
        history.write(x)
        kernel = nn.functional.pad(taps, (min_lag, history.size - min_lag - K))
        return history.filtered(kernel, T), history
    extended = extend(x, history, min_lag + K - 1)
    # The largest lag comes first in time.
    return correlate(extended[:, : T + K - 1], taps.flip(0).to(x.dtype), T), extended[:, T:]


def extend(x: Tensor, history: Tensor | None, max_lag: int) -> Tensor:
    """`x` [B, T, C] with the `max_lag` positions before it in front: [B, max_lag + T, C]."""
    if history is None:
        return nn.functional.pad(x, (0, 0, max_lag, 0))
    return torch.cat((history.to(x.dtype), x), dim=1)
