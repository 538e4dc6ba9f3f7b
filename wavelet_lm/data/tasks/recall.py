"""Sequences that ask for what stood in them before: recall, selective copying, induction.

Every example is drawn anew. A batch is a pure function of the shape, the seed, the part (training,
validation, test) and the step, and shapes of which there are few examples are refused, so that none
comes twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wavelet_lm.errors import UserError

PARTS = ("train", "valid", "test")
# Of fewer different examples, two of a training of thousands of batches might be the same: with
# 24,000 drawn from so many, one training in 350 has a pair of them.
FEWEST = 10**11


class Questions(NamedTuple):
    """Sequences side by side, each with equally many questions.

    inputs: [B, T] int64 tokens; asked: [B, Q] int64, the positions after which an answer is due;
    answers: [B, Q] int64 tokens; distances: [B, Q] int64, how far before `asked` each answer
    stands: inputs[b, asked - distance] is the answer.
    """

    inputs: Tensor
    asked: Tensor
    answers: Tensor
    distances: Tensor


@dataclass(frozen=True)
class RecallTask:
    """What is asked, by its shape. values: tokens that can be an answer; length: of a sequence.

    Raises:
        UserError: there is no such sequence, or there are too few different ones.
    """

    values: int
    length: int
    name: ClassVar[str]
    meaning: ClassVar[str]
    grows: ClassVar[tuple[str, ...]] = ("length",)

    def __post_init__(self) -> None:
        for spec in fields(self):
            least = 2 if spec.name == "values" else 1
            if (given := getattr(self, spec.name)) < least:
                raise UserError(f"{spec.name} is {given}; it must be {least} or more")
        self._check()
        if self.n_examples() < FEWEST:
            raise UserError(
                f"there are only {self.n_examples():,} different sequences of this shape, so that"
                " some would come twice; raise length or values"
            )

    @property
    def vocab_size(self) -> int:
        """Tokens; the values are the last ones."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """The share of right answers of one who draws from all values."""
        return 1 / self.values

    def n_examples(self) -> int:
        """How many different sequences there are, or a number below it."""
        raise NotImplementedError

    def describe(self) -> str:
        """The shape in words."""
        raise NotImplementedError

    def _check(self) -> None:
        """Raise `UserError` where the numbers do not fit each other."""
        raise NotImplementedError

    def _draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, ...]:
        """inputs [n, T], asked [n, Q] and where the answers stand [n, Q]."""
        raise NotImplementedError

    def shorter(self, doublings: int) -> list[tuple[int, RecallTask]]:
        """Sequences to begin with: a 2^doublings-th of the length and of what it holds, …, a half.

        Returns:
            How many times shorter each is, and its task.

        Raises:
            UserError: nothing is left, or there are too few different sequences.
        """
        found = []
        for n in range(doublings, 0, -1):
            try:
                less = {key: getattr(self, key) // 2**n for key in self.grows}
                found.append((2**n, replace(self, **less)))
            except UserError as error:
                raise UserError(f"a curriculum of {doublings} begins too small: {error}") from None
        return found

    def questions(self, n: int, seed: int, part: str, step: int) -> Questions:
        """The n examples of a step of `PARTS`, always the same ones."""
        random = np.random.default_rng((seed, PARTS.index(part), step))
        inputs, asked, places = (torch.from_numpy(a) for a in self._draw(n, random))
        return Questions(inputs, asked, inputs.gather(1, places), asked - places)


@dataclass(frozen=True)
class MultiQueryRecall(RecallTask):
    """Pairs of a key and a value, then keys among blanks: which value came with each of them?

    Arora et al., 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models". Here
    the questions are spread evenly over all that follows the pairs, and no answer is given away: a
    blank or the next question follows.

    pairs: of different keys; keys: to draw them from; queries: questions, each pair once before
    any comes again; 0 = as many as pairs.
    """

    values: int = 64
    length: int = 128
    pairs: int = 16
    keys: int = 64
    queries: int = 0
    name: ClassVar[str] = "mqar"
    grows: ClassVar[tuple[str, ...]] = ("length", "pairs", "queries")
    meaning: ClassVar[str] = "multi-query associative recall"

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", self.queries or self.pairs)
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        return 1 + self.keys + self.values

    def n_examples(self) -> int:
        pairs = math.perm(self.keys, self.pairs) * self.values**self.pairs
        places = math.comb(self.length - 2 * self.pairs, self.queries)
        return pairs * places * math.perm(self.pairs, min(self.queries, self.pairs))

    def describe(self) -> str:
        return (
            f"{self.pairs} pairs of {self.keys} keys and {self.values} values, {self.queries}"
            f" queries, length {self.length:,}"
        )

    def _check(self) -> None:
        if self.keys < self.pairs:
            raise UserError(
                f"{self.pairs} pairs need as many keys, and keys is {self.keys}; raise keys or"
                " lower pairs"
            )
        if self.length < (needed := 2 * self.pairs + self.queries):
            raise UserError(
                f"{self.pairs} pairs and {self.queries} queries need {needed} positions, and length"
                f" is {self.length}"
            )

    def _draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, ...]:
        end = 2 * self.pairs
        keys = 1 + _distinct(random, n, self.keys, self.pairs)
        inputs = np.zeros((n, self.length), dtype=np.int64)
        inputs[:, 0:end:2] = keys
        inputs[:, 1:end:2] = random.integers(self.values, size=(n, self.pairs)) + 1 + self.keys
        asked = np.sort(end + _distinct(random, n, self.length - end, self.queries), axis=1)
        rounds = -(-self.queries // self.pairs)
        which = np.concatenate(
            [_distinct(random, n, self.pairs, self.pairs) for _ in range(rounds)], axis=1
        )[:, : self.queries]
        np.put_along_axis(inputs, asked, np.take_along_axis(keys, which, axis=1), axis=1)
        return inputs, asked, 2 * which + 1


@dataclass(frozen=True)
class SelectiveCopying(RecallTask):
    """Values among blanks, then one mark for each of them: the values in their order.

    Gu & Dao, 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces".

    items: values to copy.
    """

    values: int = 16
    length: int = 128
    items: int = 16
    name: ClassVar[str] = "copying"
    grows: ClassVar[tuple[str, ...]] = ("length", "items")
    meaning: ClassVar[str] = "selective copying"

    @property
    def vocab_size(self) -> int:
        return 2 + self.values

    def n_examples(self) -> int:
        return math.comb(self.length - self.items, self.items) * self.values**self.items

    def describe(self) -> str:
        return f"{self.items} items of {self.values} values, length {self.length:,}"

    def _check(self) -> None:
        if self.length < 2 * self.items:
            raise UserError(
                f"{self.items} items and as many marks need {2 * self.items} positions, and length"
                f" is {self.length}"
            )

    def _draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, ...]:
        first_mark = self.length - self.items
        places = np.sort(_distinct(random, n, first_mark, self.items), axis=1)
        inputs = np.zeros((n, self.length), dtype=np.int64)
        values = 2 + random.integers(self.values, size=places.shape)
        np.put_along_axis(inputs, places, values, axis=1)
        inputs[:, first_mark:] = 1
        asked = np.broadcast_to(np.arange(first_mark, self.length), places.shape)
        return inputs, asked.copy(), places


@dataclass(frozen=True)
class Induction(RecallTask):
    """Random values with a mark somewhere among them, and the mark again: what came after it?

    Fu et al., 2022, "Hungry Hungry Hippos"; Olsson et al., 2022, "In-context Learning and Induction
    Heads". There is one question in each sequence.
    """

    values: int = 16
    length: int = 128
    name: ClassVar[str] = "induction"
    meaning: ClassVar[str] = "induction"

    @property
    def vocab_size(self) -> int:
        return 1 + self.values

    def n_examples(self) -> int:
        return (self.length - 2) * self.values ** (self.length - 2)

    def describe(self) -> str:
        return f"one mark among {self.values} values, length {self.length:,}"

    def _check(self) -> None:
        if self.length < 3:
            raise UserError(f"length is {self.length}; a mark, a value and a mark need 3 positions")

    def _draw(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, ...]:
        inputs = 1 + random.integers(self.values, size=(n, self.length))
        marks = random.integers(self.length - 2, size=(n, 1))
        np.put_along_axis(inputs, marks, 0, axis=1)
        inputs[:, -1] = 0
        return inputs, np.full((n, 1), self.length - 1), marks + 1


TASKS = {task.name: task for task in (MultiQueryRecall, SelectiveCopying, Induction)}


def _distinct(random: np.random.Generator, n: int, most: int, k: int) -> np.ndarray:
    """[n, k] numbers below `most`, in each row k different ones in random order."""
    return random.random((n, most)).argsort(axis=1)[:, :k]
