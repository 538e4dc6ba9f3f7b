"""The fixed, undecimated, causal Haar transform (à trous)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from wavelet_lm.transforms.delays import Shift
from wavelet_lm.transforms.history import Ring
from wavelet_lm.transforms.wavelet import Wavelet


class HaarWavelet(Wavelet):
    """Levels k = 0 … L−1 of c_0 = x, with delays of 2^k positions:

        c_{k+1} = (c_k + shift c_k) / √2        d_k = (c_k − shift c_k) / √2

    and back: c_k = (c_{k+1} + d_k) / √2. No parameters.

    Examples:
        >>> x = torch.randn(2, 10, 4)  # [B, T, C]
        >>> wavelet = HaarWavelet(levels=3)
        >>> bands, state = wavelet.decompose(x)
        >>> len(bands), bands[0].shape, wavelet.reach
        (4, torch.Size([2, 10, 4]), 7)
        >>> torch.allclose(wavelet.reconstruct(bands), x, atol=1e-6)
        True

        In two chunks, the second of which begins with the state after the first:

        >>> first, state = wavelet.decompose(x[:, :6])
        >>> second, state = wavelet.decompose(x[:, 6:], state)
        >>> torch.allclose(torch.cat((first[0], second[0]), 1), bands[0])
        True
    """

    def __init__(self, levels: int):
        super().__init__()
        self.delays = nn.ModuleList(Shift(2**k) for k in range(levels))

    def past_by_detail(self) -> tuple[float, float]:
        """Exactly, at all times."""
        return 1.0, -math.sqrt(2)

    def split(
        self, k: int, x: Tensor, history: Tensor | Ring | None = None
    ) -> tuple[Tensor, Tensor, Tensor | Ring]:
        past, history = self.delays[k](x.flatten(2), history)
        past = past.view_as(x)
        return (x + past) / math.sqrt(2), (x - past) / math.sqrt(2), history

    def merge(self, k: int, approximation: Tensor, detail: Tensor) -> Tensor:
        return (approximation + detail) / math.sqrt(2)
