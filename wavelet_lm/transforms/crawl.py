"""Causal delays: the plain shift of the à trous wavelet, and the learned mixture of lags (crawl).

Both are called as `past, history = delay(x, history)`; the history is the last `max_lag` positions
of the signal, [B, max_lag, C], and None means that nothing came before (zeros).
"""

import torch
from torch import Tensor, nn

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

    def forward(self, x: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor]:
        extended = extend(x, history, self.max_lag)
        return extended[:, : x.shape[1]], extended[:, x.shape[1] :]


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

    def forward(self, x: Tensor, history: Tensor | None = None) -> tuple[Tensor, Tensor]:
        T = x.shape[1]
        extended = extend(x, history, self.max_lag)
        taps = self.logits.softmax(0).flip(0).to(x.dtype)  # the largest lag comes first in time
        visible = extended[:, : T + self.max_lag - self.min_lag]
        return correlate(visible, taps, T), extended[:, T:]


def extend(x: Tensor, history: Tensor | None, max_lag: int) -> Tensor:
    """`x` [B, T, C] with the `max_lag` positions before it in front: [B, max_lag + T, C]."""
    if history is None:
        return nn.functional.pad(x, (0, 0, max_lag, 0))
    return torch.cat((history.to(x.dtype), x), dim=1)
