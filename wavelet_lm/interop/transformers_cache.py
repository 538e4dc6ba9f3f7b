"""The state of a model where transformers has keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from wavelet_lm.models.base import detached


class WaveletLMCache:
    """The state of B texts in place of keys and values; `forward` takes it along in place.

    `copy.deepcopy` forks it. What was read cannot be taken back.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.state: Any = None
        self._n_read = 0

    def update(self, state: Any, n: int) -> None:
        """The state after n more positions, padding among them; no gradient runs through it."""
        self.state, self._n_read = detached(state), self._n_read + n

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that were read, padding among them."""
        return self._n_read

    def get_max_cache_shape(self) -> int:
        """-1: it grows with no text."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from row beam_idx[i] ([B] int64)."""
        self.state = rows_of(self.state, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every text `repeats` times, side by side."""
        repeat = lambda x: x.repeat_interleave(repeats, 0)  # noqa: E731
        self.state = tree_map_only(Tensor, repeat, self.state)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The texts of these rows ([n] int64) alone."""
        self.state = rows_of(self.state, indices)

    def crop(self, max_length: int) -> None:
        """Refused: a state does not go back."""
        raise ValueError(
            "a WaveletLM's state cannot be cut back to fewer tokens; copy the cache before they are"
            " read"
        )


def rows_of(state: Any, rows: Tensor) -> Any:
    """The state of these rows ([n] int64) of its texts."""
    return tree_map_only(Tensor, lambda leaf: leaf[rows.to(leaf.device)], state)
