"""Filters of every position, in the form that suits their length."""

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
