"""Sentences of a text, and the texts in which one of them comes again."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from wavelet_lm.errors import UserError

# The first tokens of a sentence that comes again say which one it is, and are not scored.
CUE = 8
SHORTEST = 2 * CUE
# Tokens in which the next sentence of a fitting length is looked for, and how often.
SEARCHED = 4000
STRETCHES = 50
# A full stop with the quotes and brackets that close after it, or nothing before a blank line.
END = re.compile(rb"[.!?](?:[\"')\]]|\xe2\x80[\x99\x9d])*(?=\s)|(?=\n\s*\n)")


class Needle(NamedTuple):
    """A sentence: tokens[start:end] of the text."""

    start: int
    end: int

    def texts(self, tokens: np.ndarray, lead: int, distance: int) -> tuple[np.ndarray, np.ndarray]:
        """The text from `lead` tokens before the sentence on, and the sentence again at the end.

        Every token of it stands `distance` behind its first time. The second text is the same
        without the first time.
        """
        again = tokens[self.start : self.end]
        before = tokens[self.start - lead : self.start]
        after = tokens[self.end : self.start + distance]
        return np.concatenate([before, again, after, again]), np.concatenate([before, after, again])


def find_needles(
    tokens: np.ndarray,
    token_bytes: Callable[[int], bytes],
    n: int,
    *,
    lead: int,
    distances: Sequence[int],
) -> list[Needle]:
    """Up to n sentences, evenly spaced over the text; the same ones serve every distance.

    Args:
        tokens: [N], any integer type; may be a memory map.
        token_bytes: of a token, UTF-8.
        lead: tokens that are to stand before a sentence.
        distances: each of them a sentence long at least.

    Raises:
        UserError: the text is too short, or has no such sentence.
    """
    longest = min(distances)
    last = len(tokens) - max(distances) - 1
    if last < lead:
        raise UserError(
            f"the text has {len(tokens):,} tokens, and a distance of {max(distances):,} needs"
            f" {lead + max(distances) + 1:,}; give a longer text or smaller --distances"
        )
    places = np.linspace(lead, last, n + 1, dtype=np.int64).tolist()
    searched = (_sentence_between(tokens, token_bytes, longest, *part) for part in pairwise(places))
    found = [needle for needle in searched if needle is not None]
    if not found:
        raise UserError(
            f"the text has no sentence of {SHORTEST} to {longest:,} tokens with {lead:,} tokens"
            f" before it and {max(distances):,} after; give a longer text or other --distances"
        )
    return found


def _sentence_between(
    tokens: np.ndarray, token_bytes: Callable[[int], bytes], longest: int, start: int, stop: int
) -> Needle | None:
    """The first sentence of SHORTEST to `longest` tokens that begins between two positions."""
    step = max(SEARCHED, 4 * longest)
    for first in range(start, min(stop, start + STRETCHES * step), step):
        # What begins in one stretch may end in the next.
        stretch = tokens[first : min(first + step + longest, len(tokens))]
        needle = _first_sentence(stretch, token_bytes, longest)
        if needle is not None:
            begin, end = needle.start + first, needle.end + first
            return Needle(begin, end) if begin < stop else None
    return None


def _first_sentence(
    tokens: np.ndarray, token_bytes: Callable[[int], bytes], longest: int
) -> Needle | None:
    """The first sentence of SHORTEST to `longest` tokens that begins and ends in here."""
    pieces = [token_bytes(int(token)) for token in tokens]
    ends = np.cumsum([len(piece) for piece in pieces])
    text = b"".join(pieces)
    for before, match in pairwise(END.finditer(text)):
        stop, next_stop = before.end(), match.end()
        if not match[0]:  # what a blank line ends is a heading or a verse
            continue
        first = stop + len(text[stop:next_stop]) - len(text[stop:next_stop].lstrip())
        # A token may hold the space before its word, and belongs to what its last byte is in.
        start = int(np.searchsorted(ends, first, side="right"))
        end = int(np.searchsorted(ends, next_stop, side="left")) + 1
        if SHORTEST <= end - start <= longest:
            return Needle(start, end)
    return None
