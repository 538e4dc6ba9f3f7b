"""Causal moving averages of growing length over a part of the channels (WaveletGPT).

Verma, 2024, "WaveletGPT: Wavelets Meet Large Language Models": the first channels of a signal pass
unchanged; channel i of the E − i₀ others is averaged over a window that grows in equal steps from
2 positions to the context,

    f(i) = 2^(1 + ⌊(i − i₀) · n_levels / (E − i₀)⌋),   n_levels = ⌊log2(context)⌋

Every kind but `ema` is a causal FIR filter per channel with a kernel of sum 1 at first; the cost is
linear in time. Sums are taken in float32 at least, and anew at every position: no differences of
running sums, whose rounding errors grow with the text, and no FFT, which would leak the future.
"""

import difflib

import numpy as np
import torch
from torch import Tensor, nn

from wavelet_lm.errors import UserError
from wavelet_lm.transforms.correlation import MAX_SHIFTED_TAPS
from wavelet_lm.transforms.dtypes import wide, without_autocast
from wavelet_lm.transforms.history import Ring, carried, remember
from wavelet_lm.transforms.means import linear_recurrence

MIN_BLOCK = 64
NO_PYWAVELETS = (
    "wavelet families need PyWavelets; install it with"
    " python -m pip install -c constraints.txt PyWavelets"
)


class MovingAverages(nn.Module):
    """The module between two blocks of a WaveletGPT.

    Args:
        kind: `haar` (the mean of the window), `learnable` (a kernel per channel, or per level with
            `shared_kernels`, that starts as it), `ema` (exponential means of growing weight), or a
            discrete wavelet of PyWavelets such as `db2` (its scaling filter, cascaded).
        channels: E of the signal.
        context: the longest window in positions, 2 or more.
        fraction: share of the channels that are averaged, the last ones.

    Raises:
        UserError: kind is unknown, PyWavelets is missing, or no channel is left to average.
    """

    component = "moving averages"

    def __init__(
        self,
        kind: str,
        channels: int,
        context: int,
        fraction: float = 0.5,
        shared_kernels: bool = False,
    ):
        super().__init__()
        n = round(fraction * channels)
        if n < 1 or context < 2:
            raise UserError(
                f"wavelet_fraction {fraction:g} of {channels} channels and {context} positions"
                " leave nothing to average; raise wavelet_fraction, C or block_size"
            )
        self.n_kept = channels - n
        levels = channel_levels(n, context)
        if kind == "ema":
            self.filter: nn.Module = ExponentialMeans(n)
        elif kind == "learnable":
            self.filter = LearnedFilters(levels, shared_kernels)
        elif kind == "haar":
            self.filter = FixedFilters(levels, haar_kernels(levels[-1]))
        else:
            self.filter = FixedFilters(levels, wavelet_kernels(kind, levels[-1], context))

    def forward(
        self, x: Tensor, state: Tensor | Ring | None = None
    ) -> tuple[Tensor, Tensor | Ring]:
        """Average a signal or its next chunk.

        Args:
            x: [B, T, E].
            state: what an earlier call returned, [B, positions, n]: the last inputs of the averaged
                channels, of `ema` the last output; or a `Ring` of them. None starts a text.

        Returns:
            [B, T, E] in x's dtype, and the state after it.
        """
        kept, rest = x[..., : self.n_kept], x[..., self.n_kept :]
        y, state = self.filter(rest, state)
        return torch.cat((kept, y.to(x.dtype)), -1), state


def channel_levels(n: int, context: int) -> list[int]:
    """Level of each of n channels, 1 … ⌊log2(context)⌋ in equal steps; its window is 2^level."""
    n_levels = context.bit_length() - 1
    return [1 + i * n_levels // n for i in range(n)]


# --- kernels, by lag -----------------------------------------------------------------------------


def haar_kernels(n_levels: int) -> list[np.ndarray]:
    """Of level j = 1 … n_levels: 2^j taps of 2^−j."""
    return [np.full(2**j, 2.0**-j) for j in range(1, n_levels + 1)]


def wavelet_kernels(name: str, n_levels: int, context: int) -> list[np.ndarray]:
    """The undecimated approximations of a discrete wavelet, as causal kernels of sum 1.

    Level j is the cascade of the analysis scaling filter h (Mallat, "A Wavelet Tour of Signal
    Processing", 7.3), h_j = h ∗ h↑2 ∗ … ∗ h↑2^{j−1}. What is longer than `context` is cut to the
    `context` taps in a row of the largest sum, which start at lag 0: the beginning of a long
    kernel would be next to nothing.

    Raises:
        UserError: PyWavelets is missing or has no discrete wavelet of this name.
    """
    try:
        import pywt
    except ImportError:
        raise UserError(NO_PYWAVELETS) from None
    known = pywt.wavelist(kind="discrete")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or ["db2", "sym4", "coif1"]
        raise UserError(
            f"wavelet_module is {name!r}; it must be haar, learnable, ema or a discrete wavelet of"
            f" PyWavelets such as {', '.join(near)}"
        )
    # PyWavelets keeps the filter in the order of a convolution, and pads biorthogonal ones.
    taps = np.trim_zeros(np.asarray(pywt.Wavelet(name).dec_lo)[::-1])
    kernel, kernels = np.ones(1), []
    for j in range(n_levels):
        dilated = np.zeros((len(taps) - 1) * 2**j + 1)
        dilated[:: 2**j] = taps / taps.sum()
        kernel = np.convolve(kernel, dilated)
        cut = kernel
        if len(kernel) > context:
            sums = np.convolve(kernel, np.ones(context), "valid")
            start = int(sums.argmax())
            cut = kernel[start : start + context]
        kernels.append(cut / cut.sum())
    return kernels


def _grouped(levels: list[int], lengths: list[int]) -> list[tuple[int, int, int]]:
    """Runs of channels of one level: (first channel, end, taps), for `lengths` by level."""
    starts = [i for i, level in enumerate(levels) if i == 0 or level != levels[i - 1]]
    ends = [*starts[1:], len(levels)]
    return [(a, b, lengths[levels[a] - 1]) for a, b in zip(starts, ends, strict=True)]


# --- filters -------------------------------------------------------------------------------------


class Filters(nn.Module):
    """y_t = Σ_o k_o ⊙ x_{t−o}, a kernel per channel; a subclass gives `kernels`."""

    def __init__(self, groups: list[tuple[int, int, int]]):
        super().__init__()
        self.groups = groups
        self.max_lag = max(taps for _, _, taps in groups) - 1

    def kernels(self) -> Tensor:
        """[max_lag + 1, n] by lag, zero beyond a channel's own taps."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: Tensor | Ring | None) -> tuple[Tensor, Tensor | Ring]:
        """[B, T, n] -> averages [B, T, n] in float32 at least, and the state after them."""
        signal = remember(x, state, self.max_lag)
        return self._averages(wide(signal.whole()), x.shape[1]), signal.state

    def _averages(self, extended: Tensor, T: int) -> Tensor:
        """[B, max_lag + T, n] -> [B, T, n]."""
        kernels = self.kernels().to(extended.dtype)
        return torch.cat(
            [
                filtered(extended[:, self.max_lag + 1 - taps :, a:b], kernels[:taps, a:b])
                for a, b, taps in self.groups
            ],
            -1,
        )


class FixedFilters(Filters):
    """Kernels without parameters, one for each level."""

    def __init__(self, levels: list[int], kernels: list[np.ndarray]):
        super().__init__(_grouped(levels, [len(kernel) for kernel in kernels]))
        table = np.zeros((self.max_lag + 1, len(levels)))
        for a, b, taps in self.groups:
            table[:taps, a:b] = kernels[levels[a] - 1][:, None]
        self.register_buffer("table", torch.tensor(table, dtype=torch.float32), persistent=False)
        self.are_means = all((kernel == 1 / len(kernel)).all() for kernel in kernels)

    def kernels(self) -> Tensor:
        return self.table

    def _averages(self, extended: Tensor, T: int) -> Tensor:
        return self._means(extended, T) if self.are_means else super()._averages(extended, T)

    def _means(self, extended: Tensor, T: int) -> Tensor:
        """Means over 2^j positions by doubling: a sum over 2m is one over m and the one before."""
        sums, first, means, m = extended, 0, [], 1
        for _, end, taps in self.groups:
            while m < taps:
                sums = sums[:, m:] + sums[:, :-m]
                m *= 2
            means.append(sums[:, -T:, : end - first] / taps)
            sums, first = sums[..., end - first :], end
        return torch.cat(means, -1)


class LearnedFilters(Filters):
    """Kernels that are learned and start as means over 2^level positions.

    weights: one vector, level by level and tap by tap: of each channel, or of the whole level.
    n_products: that one position takes.
    """

    def __init__(self, levels: list[int], shared: bool):
        super().__init__(_grouped(levels, [2**level for level in range(1, levels[-1] + 1)]))
        self.shared = shared
        self.n_products = sum(taps * (b - a) for a, b, taps in self.groups)
        sizes = [taps if shared else taps * (b - a) for a, b, taps in self.groups]
        values = [torch.full((n,), 1 / g[2]) for n, g in zip(sizes, self.groups, strict=True)]
        self.weights = nn.Parameter(torch.cat(values))
        # Where in `weights` each tap is; the place behind its end holds a zero.
        places = np.full((self.max_lag + 1, len(levels)), sum(sizes))
        offset = 0
        for (a, b, taps), size in zip(self.groups, sizes, strict=True):
            places[:taps, a:b] = offset + np.arange(size).reshape(taps, -1)
            offset += size
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def kernels(self) -> Tensor:
        return nn.functional.pad(self.weights, (0, 1))[self.places]


def filtered(x: Tensor, kernels: Tensor) -> Tensor:
    """Σ_o kernels_o ⊙ x_{t−o} where all of it is there.

    Args:
        x: [B, K − 1 + T, C].
        kernels: [K, C], by lag.

    Returns:
        [B, T, C].
    """
    K, C = kernels.shape
    B, T = x.shape[0], x.shape[1] - K + 1
    if T == 1:
        return (x * kernels.flip(0)).sum(1, keepdim=True)
    if K <= MAX_SHIFTED_TAPS:
        return sum(kernels[o] * x[:, K - 1 - o : K - 1 - o + T] for o in range(K))
    # Blocks of outputs as products with a band of taps: each position is read about twice.
    block = min(max(MIN_BLOCK, K), T)
    n_blocks = -(-T // block)
    x = nn.functional.pad(x, (0, 0, 0, n_blocks * block - T))
    columns = torch.arange(block, device=x.device)[:, None] + torch.arange(K, device=x.device)
    taps = kernels.flip(0).T[:, None].expand(C, block, K)
    band = kernels.new_zeros(C, block, block + K - 1).scatter(2, columns.expand(C, -1, -1), taps)
    windows = x.unfold(1, block + K - 1, block)  # [B, n_blocks, C, block + K − 1]
    with without_autocast(x):  # a long sum in half precision loses digits
        y = band @ windows.permute(2, 3, 0, 1).reshape(C, block + K - 1, B * n_blocks)
    return y.view(C, block, B, n_blocks).permute(2, 3, 1, 0).reshape(B, -1, C)[:, :T]


class ExponentialMeans(nn.Module):
    """s_t = α_i x_t + (1 − α_i) s_{t−1} from s_0 = x_0, with α_i = (i + 1) / n for channel i."""

    max_lag = 1

    def __init__(self, n: int):
        super().__init__()
        alpha = torch.arange(1, n + 1, dtype=torch.float32) / n
        self.register_buffer("alpha", alpha, persistent=False)

    def forward(self, x: Tensor, state: Tensor | Ring | None) -> tuple[Tensor, Tensor | Ring]:
        """[B, T, n] -> means [B, T, n] in float32 at least, and the last of them [B, 1, n]."""
        x = wide(x)
        alpha = self.alpha.to(x.dtype)
        scan = carried(x[:, :1] if state is None else state)
        keep = (1 - alpha).expand(1, x.shape[1], -1)
        y = linear_recurrence(keep, alpha * x, scan.before()[:, 0].to(x.dtype))
        return y, scan.after(y)
