"""Filters of every position, in the form that suits their length."""

import torch
from torch import Tensor, nn

from wavelet_lm.transforms.dtypes import as_factor, wide

# Up to this many taps a sum of shifted views is quickest (and fuses into its neighbours under
# torch.compile); above, a banded product reads each position once per block instead of once a tap.
MAX_SHIFTED_TAPS = 8
BLOCK = 64
# Up to so many positions a compiled step on a GPU multiplies a signal by a matrix of all of them:
# of what is multiplied most is zero, but nothing is copied.
MOST_MULTIPLIED = 512


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


def filtered_at_once(x: Tensor, taps: Tensor, min_lag: int) -> Tensor | None:
    """y_t = Σ_j taps_j · x_{t−m−j} from the start of a text, in a compiled step on a GPU.

    x [B, T, C], taps [K] -> [B, T, C], or None elsewhere and of longer texts.
    """
    if not (torch.compiler.is_compiling() and x.is_cuda):
        return None
    if len(taps) <= MAX_SHIFTED_TAPS:
        return DelayedSum.apply(taps.to(x.dtype), x, min_lag)
    if x.shape[1] <= MOST_MULTIPLIED:
        return MultipliedFilter.apply(as_factor(taps), as_factor(x), min_lag)
    return None


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


class MultipliedFilter(torch.autograd.Function):
    """y_t = Σ_j taps_j · x_{t−m−j}, zeros before the text, as a product with a matrix of the taps.

    For a compiled step on CUDA: in the products of `correlate` the windows of a signal are copies,
    half as large again, and so are their gradients, which are then added up.
    """

    @staticmethod
    def forward(ctx, taps: Tensor, x: Tensor, min_lag: int) -> Tensor:
        """[K], [B, T, C], m -> [B, T, C]."""
        ctx.save_for_backward(taps, x)
        ctx.min_lag = min_lag
        return torch.bmm(_matrix(taps, min_lag, len(x), x.shape[1]), x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """[B, T, C] -> [K], [B, T, C]."""
        taps, x = ctx.saved_tensors
        B, T, _ = x.shape
        of_matrix = torch.bmm(grad, x.mT).sum(0, dtype=wide(x).dtype)
        # Row j: what stands at t − s = m + j, for every t.
        t = torch.arange(T, device=x.device)
        s = t - ctx.min_lag - torch.arange(len(taps), device=x.device)[:, None]
        of_taps = torch.where(s >= 0, of_matrix[t, s.clamp(min=0)], 0).sum(1)
        return of_taps.to(taps.dtype), torch.bmm(_matrix(taps, ctx.min_lag, B, T).mT, grad), None


def _matrix(taps: Tensor, min_lag: int, B: int, T: int) -> Tensor:
    """M[t, s] = taps_{t−s−min_lag}, the same for all of B texts: [B, T, T]."""
    t = torch.arange(T, device=taps.device)
    j = t[:, None] - t - min_lag
    inside = (j >= 0) & (j < len(taps))
    return torch.where(inside, taps[j.clamp(0, len(taps) - 1)], 0).expand(B, T, T)


def shifted(x: Tensor, lag: int) -> Tensor:
    """x_{t−lag} of x [B, T, C], zero outside of it: the same shape."""
    T = x.shape[1]
    lag = max(-T, min(T, lag))
    if lag >= 0:
        return nn.functional.pad(x[:, : T - lag], (0, 0, lag, 0))
    return nn.functional.pad(x[:, -lag:], (0, 0, 0, -lag))
