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


class DelayedSum(torch.autograd.Function):
    """y_t = Σ_j taps_j · x_{t−m−j}, few taps, zeros before the text: for a compiled step on CUDA.

    Nothing is put before the signal, and its gradient is one expression: the compiler makes a
    kernel of each, where autograd would have a padded gradient for every tap. On a CPU the zeros
    that stand in memory cost less than asking at every position whether it has any.
    """

    @staticmethod
    def forward(ctx, taps: Tensor, x: Tensor, min_lag: int) -> Tensor:
        """[K], [B, T, C], m -> [B, T, C]."""
        ctx.save_for_backward(taps, x)
        ctx.min_lag = min_lag
        return sum(tap * shifted(x, min_lag + j) for j, tap in enumerate(taps.unbind()))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """[B, T, C] -> [K], [B, T, C]."""
        taps, x = ctx.saved_tensors
        lags = range(ctx.min_lag, ctx.min_lag + len(taps))
        of_taps = torch.stack([(grad * shifted(x, lag)).sum() for lag in lags])
        pairs = zip(taps.unbind(), lags, strict=True)
        return of_taps, sum(tap * shifted(grad, -lag) for tap, lag in pairs), None


def shifted(x: Tensor, lag: int) -> Tensor:
    """x_{t−lag} of x [B, T, C], zero outside of it: the same shape."""
    T = x.shape[1]
    lag = max(-T, min(T, lag))
    if lag >= 0:
        return nn.functional.pad(x[:, : T - lag], (0, 0, lag, 0))
    return nn.functional.pad(x[:, -lag:], (0, 0, 0, -lag))
