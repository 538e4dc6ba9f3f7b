"""What a causal, undecimated wavelet is: one step per level, and its inverse.

A wavelet gives `delays`, one a level, and the two steps

    c_{k+1}, d_k, history = split(k, c_k, history)       approximation, detail
    c_k                   = merge(k, c_{k+1}, d_k)       pointwise in time: it needs no past

from which decomposition and reconstruction follow.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from wavelet_lm.transforms.dtypes import as_summand
from wavelet_lm.transforms.history import Ring

Histories = tuple[Tensor | Ring, ...]


class Wavelet(nn.Module):
    """`decompose` into levels + 1 bands and `reconstruct` from them; a subclass gives the steps."""

    component = "wavelet nets"
    delays: nn.ModuleList

    @property
    def levels(self) -> int:
        """L; there are L + 1 bands."""
        return len(self.delays)

    @property
    def reach(self) -> int:
        """How many positions back the coarsest band sees."""
        return sum(delay.max_lag for delay in self.delays)

    def past_by_detail(self) -> tuple[float, float]:
        """(a, b): before training, the signal one position back is near a x + b d_0."""
        raise NotImplementedError

    def at_level(self, k: int) -> list[nn.Module]:
        """The nets that `split` and `merge` run at level k."""
        return []

    def split(
        self, k: int, x: Tensor, history: Tensor | Ring | None = None
    ) -> tuple[Tensor, Tensor, Tensor | Ring]:
        """Level k of x [B, T, …, C]: approximation, detail, and the history of the delay."""
        raise NotImplementedError

    def merge(self, k: int, approximation: Tensor, detail: Tensor) -> Tensor:
        """The inverse of `split`, pointwise in time: two of [B, T, …, C] -> the same shape."""
        raise NotImplementedError

    def decompose(
        self, x: Tensor, state: Histories | None = None
    ) -> tuple[list[Tensor], Histories]:
        """Split a signal into bands.

        Args:
            x: [B, T, C], a whole signal or its next chunk.
            state: per level the positions that its delay still needs; None starts a text.

        Returns:
            The bands [a, d_{L−1}, …, d_0], coarse to fine, each [B, T, C], and the state.
        """
        details, histories = [], []
        for k in range(self.levels):
            x, detail, history = self.split(k, x, None if state is None else state[k])
            details.append(detail)
            histories.append(history)
        return [x, *reversed(details)], tuple(histories)

    def reconstruct(self, bands: Sequence[Tensor] | Tensor) -> Tensor:
        """Bands, coarse to fine, each [B, T, C], back to a signal; exact where `merge` is.

        They may be one tensor [levels + 1, B, T, C].
        """
        x, *details = bands
        x = as_summand(x)  # sums over all levels
        for k, detail in zip(reversed(range(self.levels)), details, strict=True):
            x = self.merge(k, x, detail)
        return x
