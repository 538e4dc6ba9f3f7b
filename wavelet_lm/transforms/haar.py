"""The fixed, undecimated, causal Haar transform (à trous)."""

import math

from torch import Tensor, nn

from wavelet_lm.transforms.crawl import Shift


class HaarWavelet(nn.Module):
    """Levels k = 0 … L−1 of c_0 = x, with delays of 2^k positions:

        c_{k+1} = (c_k + shift c_k) / √2        d_k = (c_k − shift c_k) / √2

    and back: c_k = (c_{k+1} + d_k) / √2. No parameters.
    """

    def __init__(self, levels: int):
        super().__init__()
        self.delays = nn.ModuleList(Shift(2**k) for k in range(levels))

    def split(
        self, k: int, x: Tensor, history: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Level k of x [B, T, …, C]: approximation, detail, and the history of the delay."""
        past, history = self.delays[k](x.flatten(2), history)
        past = past.view_as(x)
        return (x + past) / math.sqrt(2), (x - past) / math.sqrt(2), history

    def merge(self, k: int, approximation: Tensor, detail: Tensor) -> Tensor:
        """The inverse of `split`, pointwise in time."""
        return (approximation + detail) / math.sqrt(2)

    def decompose(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """[B, T, C] -> bands [a, d_{L−1}, …, d_0], each [B, T, C], and the state."""
        details, histories = [], []
        for k in range(len(self.delays)):
            x, detail, history = self.split(k, x, None if state is None else state[k])
            details.append(detail)
            histories.append(history)
        return [x, *reversed(details)], tuple(histories)

    def reconstruct(self, bands: list[Tensor]) -> Tensor:
        """Bands, coarse to fine, back to [B, T, C]; pointwise in time."""
        x, *details = bands
        for k, detail in zip(reversed(range(len(self.delays))), details, strict=True):
            x = self.merge(k, x, detail)
        return x
