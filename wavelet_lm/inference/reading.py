"""Texts that have been read, and what is left of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from wavelet_lm.inference.state_file import Past


class Reading(NamedTuple):
    """B texts that have been read.

    Attributes:
        texts: their tokens.
        logits: [B, V], of the tokens that come next.
        state: the model's, as `Decoder.prefill` returns it.
        draft: logits and state of the draft model, where there is one.
        n_tokens, seconds: how many tokens the last reading took in, and how long that took.
        pasts: what is left of each text before those tokens, where it comes from a file; empty:
            they are all there is.
    """

    texts: list[list[int]]
    logits: Tensor
    state: Any
    draft: tuple[Tensor, Any] | None = None
    n_tokens: int = 0
    seconds: float = 0.0
    pasts: tuple[Past, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """How many tokens each text has, known or not."""
        pasts = self.pasts or [Past()] * len(self.texts)
        return [past.n + len(text) for past, text in zip(pasts, self.texts, strict=True)]
