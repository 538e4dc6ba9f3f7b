"""Labelled sequences of any length: what a classifier is trained and judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from wavelet_lm.errors import UserError

PADDING = 0


class Batch(NamedTuple):
    """Examples side by side, padded on the right to the longest.

    inputs: [B, T] int64 tokens, or what else the model's front end reads; lengths: [B] int64, how
    many positions are real; labels: [B] int64 classes, or [B, n_classes] float32 of 0 and 1.
    """

    inputs: Tensor
    lengths: Tensor
    labels: Tensor


class Examples(Protocol):
    """A split of a task.

    lengths: [N] int64; labels: [N] int64 or [N, n_classes] float32; key: identifies the examples,
    wherever they lie.
    """

    lengths: np.ndarray
    labels: np.ndarray
    key: str

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The examples of these indices, padded to the longest of them."""


class Splits(Protocol):
    """A task by its splits. longest: positions of their longest sequence."""

    train: Examples
    valid: Examples
    test: Examples
    longest: int


class TokenExamples:
    """Sequences of tokens, one after the other in one array.

    Args:
        tokens: [Σ lengths], any integer type.
        lengths: [N], 1 or more each.
        labels: [N] classes.
    """

    def __init__(self, tokens: np.ndarray, lengths: Sequence[int], labels: Sequence[int]):
        self.tokens = tokens
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.labels = np.asarray(labels, dtype=np.int64)

    @cached_property
    def key(self) -> str:
        """What identifies the examples: a hash of tokens and labels."""
        digest = hashlib.sha256()
        for values in (self.tokens, self.lengths, self.labels):
            digest.update(np.ascontiguousarray(values))
        return digest.hexdigest()

    @classmethod
    def of(cls, pairs: Iterable[tuple[bytes, int]]) -> TokenExamples:
        """From (tokens as bytes, class)."""
        tokens, lengths, labels = bytearray(), [], []
        for sequence, label in pairs:
            tokens += sequence
            lengths.append(len(sequence))
            labels.append(label)
        return cls(np.frombuffer(bytes(tokens), np.uint8), lengths, labels)

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, i: int) -> np.ndarray:
        """The tokens of example i."""
        return self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]]

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """inputs: [B, T] int64, `PADDING` behind the end of a sequence."""
        lengths = self.lengths[indices]
        inputs = np.full((len(lengths), lengths.max()), PADDING, dtype=np.int64)
        for row, i in zip(inputs, indices, strict=True):
            row[: self.lengths[i]] = self.sequence(i)
        labels = torch.from_numpy(self.labels[indices])
        return Batch(torch.from_numpy(inputs), torch.from_numpy(lengths), labels)

    def take(self, indices: Sequence[int] | np.ndarray) -> TokenExamples:
        """The examples of these numbers alone, in this order."""
        parts = [self.sequence(i) for i in indices]
        tokens = np.concatenate(parts) if parts else self.tokens[:0]
        return TokenExamples(tokens, self.lengths[indices], self.labels[indices])


@dataclass(frozen=True)
class Task:
    """A classification task. vocab_size: tokens, the padding among them where there is one."""

    name: str
    vocab_size: int
    n_classes: int
    train: TokenExamples
    valid: TokenExamples
    test: TokenExamples

    @property
    def longest(self) -> int:
        """Positions of the longest sequence."""
        return max(int(part.lengths.max()) for part in (self.train, self.valid, self.test))


def cut(
    examples: TokenExamples, shares: Sequence[float], seed: int, source: Path
) -> list[TokenExamples]:
    """Disjoint parts of these shares, drawn at random: every class with its share in each.

    Raises:
        UserError: a part would be without examples; it names `source`.
    """
    generator = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for label in np.unique(examples.labels):
        members = generator.permutation(np.flatnonzero(examples.labels == label))
        edges = np.rint(np.cumsum(shares) * len(members)).astype(int)[:-1]
        for part, chosen in zip(parts, np.split(members, edges), strict=True):
            part.append(chosen)
    chosen = [np.sort(np.concatenate(part)) for part in parts]
    if not all(map(len, chosen)):
        raise UserError(f"{source}: {len(examples)} examples are too few to split; give more")
    return [examples.take(indices) for indices in chosen]


def some(examples: TokenExamples, n: int | None, seed: int) -> TokenExamples:
    """n of the examples drawn at random, or all of them where there are no more or n is None."""
    if n is None or n >= len(examples):
        return examples
    return examples.take(np.sort(np.random.default_rng(seed).permutation(len(examples))[:n]))
