"""Filters of every position, in the form that suits their length."""

import torch
from torch import Tensor, nn

from wavelet_lm.transforms.dtypes import wide

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
        return *_gradients(taps, x, grad, ctx.min_lag), None


def in_one_product(x: Tensor) -> bool:
    """Whether a step filters x [B, T, C] from the start of a text by a `FilterLess`.

    In the products of `correlate` the windows of a signal are copies, half as large again, and so
    are their gradients, which are then added up.
    """
    return torch.compiler.is_compiling() and x.is_cuda and x.shape[1] <= MOST_MULTIPLIED


class FilterLess(torch.autograd.Function):
    """f (Σ_j taps_j · x_{t−m−j} − y_t), zeros before the text, for a compiled step on CUDA.

    It is one product, of x with a matrix of all taps, to which the library adds y. What the
    backward pass reads is the gradient for y, whatever that of the result is made of.
    """

    @staticmethod
    def forward(ctx, taps: Tensor, x: Tensor, y: Tensor, min_lag: int, factor: float) -> Tensor:
        """[K], [B, T, C], [B, T, C], m, f -> [B, T, C]."""
        ctx.save_for_backward(taps, x)
        ctx.min_lag, ctx.factor = min_lag, factor
        matrix = _matrix(taps, min_lag, len(x), x.shape[1])
        return torch.baddbmm(y, matrix, x, beta=-factor, alpha=factor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[B, T, C] -> [K], [B, T, C], [B, T, C]."""
        taps, x = ctx.saved_tensors
        of_y = -ctx.factor * grad
        if len(taps) <= MAX_SHIFTED_TAPS:
            of_y = written(of_y)
        of_taps, of_x = _gradients(-taps, x, of_y, ctx.min_lag)
        return -of_taps, of_x, of_y, None, None


def _gradients(taps: Tensor, x: Tensor, grad: Tensor, min_lag: int) -> tuple[Tensor, Tensor]:
    """Of Σ_j taps_j · x_{t−m−j} for taps [K] and x [B, T, C], given that of its value."""
    B, T, _ = x.shape
    lags = range(min_lag, min_lag + len(taps))
    if len(taps) <= MAX_SHIFTED_TAPS:  # which become part of what made `grad` and of what reads it
        # Summed over each text first, as a bias's gradient is, in the kernel that made `grad`.
        by_text = [(grad * shifted(x, lag)).sum(1, dtype=wide(x).dtype) for lag in lags]
        of_taps = torch.stack([sums.sum() for sums in by_text]).to(taps.dtype)
        pairs = zip(taps.unbind(), lags, strict=True)
        return of_taps, sum(tap * shifted(grad, -lag) for tap, lag in pairs)
    of_matrix = torch.bmm(grad, x.mT)
    # Column j: what stands at t − s = m + j, for every t.
    t = torch.arange(T, device=x.device)[:, None]
    s = t - torch.arange(lags.start, lags.stop, device=x.device)
    by_lag = torch.where(s >= 0, of_matrix[:, t, s.clamp(min=0)], 0)
    of_taps = by_lag.sum((0, 1), dtype=wide(x).dtype).to(taps.dtype)
    return of_taps, torch.bmm(_matrix(taps, min_lag, B, T).mT, grad)


def _matrix(taps: Tensor, min_lag: int, B: int, T: int) -> Tensor:
    """M[t, s] = taps_{t−s−min_lag}, the same for all of B texts: [B, T, T]."""
    t = torch.arange(T, device=taps.device)
    j = t[:, None] - t - min_lag
    inside = (j >= 0) & (j < len(taps))
    return torch.where(inside, taps[j.clamp(0, len(taps) - 1)], 0).expand(B, T, T)


def written(x: Tensor) -> Tensor:
    """x as it is, of any shape, which a compiled step writes once for all that reads it.

    Where many read what is quickly worked out, as the shifts of a signal do, the compiler may work
    it out for each of them, and read for each what it is made of. What has its strides given
    stands in memory.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def shifted(x: Tensor, lag: int) -> Tensor:
    """x_{t−lag} of x [B, T, C], zero outside of it: the same shape."""
    T = x.shape[1]
    lag = max(-T, min(T, lag))
    if lag >= 0:
        return nn.functional.pad(x[:, : T - lag], (0, 0, lag, 0))
    return nn.functional.pad(x[:, -lag:], (0, 0, 0, -lag))
