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

    def decompose(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """[B, T, C] -> bands [a, d_{L−1}, …, d_0], each [B, T, C], and the state."""
        details, histories = [], []
        for k, delay in enumerate(self.delays):
            past, history = delay(x, None if state is None else state[k])
            details.append((x - past) / math.sqrt(2))
            x = (x + past) / math.sqrt(2)
            histories.append(history)
        return [x, *reversed(details)], tuple(histories)

    def reconstruct(self, bands: list[Tensor]) -> Tensor:
        """Bands, coarse to fine, back to [B, T, C]; pointwise in time."""
        x = bands[0]
        for detail in bands[1:]:
            x = (x + detail) / math.sqrt(2)
        return x
