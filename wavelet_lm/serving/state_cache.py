"""States of beginnings of texts, so that what was read once is not read again.

A beginning is known by a hash of its tokens, never by the text. A text that goes on from a saved
state has that state's own hash as its root.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np

from wavelet_lm.serving.known import Known

DIGEST = 16  # bytes


class Prefix:
    """The hash of a text that grows; `n` tokens of it since the root."""

    def __init__(self, root: bytes = b""):
        self.root, self.n = root, 0
        self._hash = hashlib.blake2b(root, digest_size=DIGEST)

    def add(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        self._hash.update(np.asarray(tokens, dtype=np.int32).tobytes())
        self.n += len(tokens)

    def digest(self) -> bytes:
        """Equal for equal texts of equal roots alone."""
        return self._hash.copy().digest()

    def copy(self) -> Prefix:
        """Another one, to go on differently."""
        other = Prefix.__new__(Prefix)
        other.root, other.n, other._hash = self.root, self.n, self._hash.copy()
        return other


def root_of(known: Known) -> bytes:
    """The root of texts that go on from a state that was saved."""
    parts = (known.packed.numpy().tobytes(), str(known.n).encode(), known.seen.numpy().tobytes())
    return hashlib.blake2b(b"".join(parts), digest_size=DIGEST).digest()


class StateCache:
    """The states that were used last, in so many bytes.

    Attributes:
        n_bytes: what is in it; never more than `limit`.
    """

    def __init__(self, limit: int):
        self.limit, self.n_bytes = limit, 0
        self._kept: OrderedDict[bytes, tuple[Known, bytes, int]] = OrderedDict()
        self._lengths: dict[bytes, Counter[int]] = {}  # by root: of how many tokens

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, tokens: Sequence[int], root: bytes = b"") -> tuple[Known, int] | None:
        """The longest known beginning of these tokens, and how many of them it has."""
        text = np.asarray(tokens, dtype=np.int32)
        prefix, found = Prefix(root), None
        for n in sorted(n for n in self._lengths.get(root, ()) if n <= len(text)):
            prefix.add(text[prefix.n : n])
            digest = prefix.digest()
            if digest in self._kept:
                found = digest, n
        if found is None:
            return None
        self._kept.move_to_end(found[0])
        return self._kept[found[0]][0], found[1]

    def keep(self, prefix: Prefix, known: Known) -> None:
        """Remember a beginning; what was used least recently makes room."""
        if known.n_bytes > self.limit:
            return
        digest = prefix.digest()
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return
        self._kept[digest] = known, prefix.root, prefix.n
        self._lengths.setdefault(prefix.root, Counter())[prefix.n] += 1
        self.n_bytes += known.n_bytes
        while self.n_bytes > self.limit:
            self._forget(next(iter(self._kept)))

    def _forget(self, digest: bytes) -> None:
        known, root, n = self._kept.pop(digest)
        self.n_bytes -= known.n_bytes
        lengths = self._lengths[root]
        lengths[n] -= 1
        if not lengths[n]:
            del lengths[n]
        if not lengths:
            del self._lengths[root]
