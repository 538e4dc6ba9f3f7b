"""What is known of a text that was read: one block of bytes, of one size for every text."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.state_file import LAST, packed_bits, unpacked_bits

ALIGNED = 8  # bytes; a tensor must not begin amid a number


@dataclass(frozen=True)
class Known:
    """A text that was read.

    Attributes:
        packed: [bytes] uint8, the state and the logits of the next token (`Layout`).
        n: how many tokens the text has.
        last: its last ones, up to `LAST`.
        seen: [⌈V / 8⌉] uint8, which tokens it holds (`packed_bits`).
    """

    packed: Tensor
    n: int
    last: tuple[int, ...]
    seen: Tensor

    @property
    def n_bytes(self) -> int:
        """What it takes, its own objects about included."""
        return self.packed.nbytes + self.seen.nbytes + 8 * len(self.last) + OBJECTS

    def seen_tokens(self, vocab_size: int) -> Tensor:
        """Which tokens the text holds, [V] bool."""
        return unpacked_bits(self.seen, vocab_size)


# Python's and PyTorch's objects of one `Known`, measured.
OBJECTS = 1500


class Layout:
    """Where everything of a state and its logits stands in a block of bytes."""

    def __init__(self, decoder: Decoder):
        logits, state = decoder.prefill([[0]])
        parts, self._structure = tree_flatten((state, logits))
        self._parts: list[tuple[int, int, torch.dtype, torch.Size] | None] = []
        self.n_bytes = 0
        self.vocab_size = decoder.vocab_size
        self.device = decoder.device
        for part in parts:
            if part is None:
                self._parts.append(None)
                continue
            end = self.n_bytes + part.nbytes
            self._parts.append((self.n_bytes, end, part.dtype, part.shape))
            self.n_bytes = math.ceil(end / ALIGNED) * ALIGNED

    def pack(self, state: Any, logits: Tensor, n: int, last: Sequence[int], seen: Tensor) -> Known:
        """Keep one text.

        Args:
            state: of a batch of one, as a decoder returns it.
            logits: [1, V], of the next token.
            n: tokens of the text.
            last: those at its end, one or more.
            seen: [V] bool, which tokens it holds.
        """
        packed = torch.zeros(self.n_bytes, dtype=torch.uint8)
        parts, _ = tree_flatten((state, logits))
        for part, place in zip(parts, self._parts, strict=True):
            if place is not None:
                start, end, dtype, shape = place
                packed[start:end].view(dtype).view(shape).copy_(part)
        return Known(packed, n, tuple(last[-LAST:]), packed_bits(seen.cpu()))

    def seen(self, *parts: Collection[int]) -> Tensor:
        """Which tokens some collections of them hold, [V] bool."""
        seen = torch.zeros(self.vocab_size, dtype=torch.bool)
        for part in parts:
            seen[torch.tensor(list(part), dtype=torch.int64)] = True
        return seen

    def unpack(self, known: Known) -> tuple[Any, Tensor]:
        """The state and the logits [1, V], on the decoder's device; nothing may change them."""
        parts = [
            None
            if place is None
            else known.packed[place[0] : place[1]].view(place[2]).view(place[3])
            for place in self._parts
        ]
        parts = [None if part is None else part.to(self.device) for part in parts]
        return tree_unflatten(parts, self._structure)
