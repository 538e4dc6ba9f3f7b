"""Wavelet packets (Coifman and Wickerhauser, 1992): the details are split too.

A wavelet splits the approximation of a level only; a packet transform splits every band of it, so
that L levels make a full tree of 2^L bands, undecimated and causal as the wavelet is:

    c_{k+1, 2n}, c_{k+1, 2n+1} = split_k(c_{k, n})        n = 0 … 2^k − 1,   c_{0, 0} = x

All nodes of a level are split by the same step, with the lag of that level.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wavelet_lm.roles import Runs
from wavelet_lm.transforms.dtypes import as_summand
from wavelet_lm.transforms.wavelet import Histories, Wavelet


class WaveletPackets(nn.Module):
    """The full tree of a `wavelet`, whose `split` and `merge` it calls level by level.

    Bands are in natural (Paley) order: the digits of a band's number, from the highest to the
    lowest of `levels` bits, say what was taken at levels 0, 1, …: 0 the approximation, 1 the
    detail. So band 0 is the approximation, band 1 the detail of the last level, bands 2 and 3 the
    two halves of the detail before it, and the last 2^(L−1) bands come from the finest detail.
    """

    def __init__(self, wavelet: Wavelet):
        super().__init__()
        self.wavelet = wavelet

    def runs(self) -> dict[nn.Module, Runs]:
        """Level k splits 2^k bands by the same nets, whose weights are read once."""
        levels = range(self.wavelet.levels)
        return {part: Runs(1, 2**k) for k in levels for part in self.wavelet.at_level(k)}

    def past_by_detail(self) -> tuple[float, float] | None:
        """None where the finest detail is split further, so that no band is it."""
        return self.wavelet.past_by_detail() if self.wavelet.levels == 1 else None

    @property
    def reach(self) -> int:
        """How many positions back the coarsest band sees."""
        return self.wavelet.reach

    def decompose(
        self, x: Tensor, state: Histories | None = None
    ) -> tuple[list[Tensor], Histories]:
        """Split a signal into 2^levels bands.

        Args:
            x: [B, T, C], a whole signal or its next chunk.
            state: per level k the positions that its delay still needs, with the channels of its
                2^k nodes side by side: [B, max_lag, 2^k · C]; None starts a text.

        Returns:
            The bands in natural order, each [B, T, C], and the state.
        """
        nodes, histories = x[:, :, None], []  # [B, T, 2^k, C]
        for k in range(self.wavelet.levels):
            past = None if state is None else state[k]
            *halves, history = self.wavelet.split(k, nodes, past)
            # The two children of a node follow each other: 2n and 2n + 1.
            nodes = torch.stack(halves, 3).flatten(2, 3)
            histories.append(history)
        return list(nodes.unbind(2)), tuple(histories)

    def reconstruct(self, bands: Sequence[Tensor] | Tensor) -> Tensor:
        """Bands back to [B, T, C], pointwise in time; exact where the wavelet's own way is."""
        nodes = as_summand(torch.stack(list(bands), 2))
        for k in reversed(range(self.wavelet.levels)):
            nodes = self.wavelet.merge(k, nodes[:, :, 0::2], nodes[:, :, 1::2])
        return nodes[:, :, 0]
