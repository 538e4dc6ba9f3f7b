"""Texts that are decoded side by side and join and leave between any two tokens.

Rows 0 … n − 1 are in use: a text that joins becomes the last row, and where one leaves, the last
row takes its place. So a step is one of n rows, of whichever texts, and every row is what it would
be alone, as in any batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from wavelet_lm.inference.checks import check_seed
from wavelet_lm.inference.decoder import Decoder, stacked, wide_logits
from wavelet_lm.inference.generation import NUMBERS_PER_TOKEN, step_record
from wavelet_lm.inference.sampling.logits import SamplingOptions, draw
from wavelet_lm.inference.sampling.random import uniforms
from wavelet_lm.inference.state import StaticState
from wavelet_lm.models.base import LanguageModel

FIRST_CAPACITY = 8


class RollingBatch:
    """n texts being decoded, each from a state of its own."""

    decoder: Decoder
    n: int = 0

    def join(self, state: Any) -> None:
        """One more text, in row n, from the state that `Decoder.prefill` or `state` returned."""
        raise NotImplementedError

    def leave(self, row: int) -> None:
        """One text less: the last row takes the place of this one."""
        raise NotImplementedError

    def state(self, row: int) -> Any:
        """The state of one text, of new tensors."""
        raise NotImplementedError

    def decode(self, tokens: Tensor) -> Tensor:
        """Read the next token of every text, [n] int64: logits [n, V]."""
        raise NotImplementedError


def rolling_batch(decoder: Decoder) -> RollingBatch:
    """An empty batch of a decoder whose fast weights, if there are any, rest."""
    kind = StaticRollingBatch if isinstance(decoder.model, LanguageModel) else StatesTogether
    return kind(decoder)


class StaticRollingBatch(RollingBatch):
    """A `RollingBatch` of a model with a state of fixed size, in buffers that only ever grow."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self._capacity = 0
        self._all: StaticState | None = None
        self._in_use: StaticState | None = None  # of the n rows, until others are in use

    @torch.no_grad()
    def join(self, state: Any) -> None:
        if self.n == self._capacity:
            self._grow(state)
        self.n += 1
        self._all.load_row(self.n - 1, state)
        self._in_use = None

    @torch.no_grad()
    def leave(self, row: int) -> None:
        self.n -= 1
        if row != self.n:
            for buffer in self._all.buffers():
                buffer[row] = buffer[self.n]
        self._in_use = None

    @torch.no_grad()
    def state(self, row: int) -> Any:
        return self._all.narrow(row, row + 1).snapshot()

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        if self._in_use is None:
            self._in_use = self._all.narrow(0, self.n)
        logits, _ = self.decoder.model(tokens[:, None], self._in_use.state)
        self._in_use.clock.advance(1)
        return wide_logits(logits[:, -1])

    def _grow(self, like: Any) -> None:
        self._capacity = max(FIRST_CAPACITY, 2 * self._capacity)
        empty = tree_map_only(
            Tensor, lambda leaf: leaf.new_zeros(self._capacity, *leaf.shape[1:]), like
        )
        old, self._all = self._all, StaticState(empty, 0)
        if old is not None:
            for buffer, before in zip(self._all.buffers(), old.buffers(), strict=True):
                buffer[: len(before)] = before


class StatesTogether(RollingBatch):
    """A `RollingBatch` of any model: its states are put together and taken apart."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self._state: Any = None

    def join(self, state: Any) -> None:
        self._state = state if self.n == 0 else stacked([self._state, state])
        self.n += 1

    def leave(self, row: int) -> None:
        self.n -= 1
        rows = [*range(row), *[self.n] * (row != self.n), *range(row + 1, self.n)]
        self._state = self.decoder.rows(self._state, rows) if rows else None

    def state(self, row: int) -> Any:
        return tree_map_only(Tensor, torch.clone, self.decoder.rows(self._state, [row]))

    def decode(self, tokens: Tensor) -> Tensor:
        logits, self._state = self.decoder.read(tokens[:, None], self._state)
        return logits[:, -1]


class RollingSampler:
    """Draws a token for every row of a rolling batch, each by options of its own.

    Rows join and leave as those of the batch.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self.n = 0
        self._options: list[SamplingOptions] = []
        self._groups: dict[SamplingOptions, Tensor] | None = None
        self._seeds = torch.zeros(0, dtype=torch.int64, device=device)
        self._count = torch.zeros(0, dtype=torch.int64, device=device)
        self._seen = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    def join(self, options: SamplingOptions, seed: int, seen: Tensor) -> None:
        """One more row; seen: [V] bool, the tokens that its text holds."""
        if self.n == len(self._seeds):
            more = max(FIRST_CAPACITY, self.n)
            self._seeds, self._count, self._seen = (
                torch.cat((part, part.new_zeros(more, *part.shape[1:])))
                for part in (self._seeds, self._count, self._seen)
            )
        self._seeds[self.n], self._count[self.n], self._seen[self.n] = check_seed(seed), 0, seen
        self._options.append(options)
        self.n, self._groups = self.n + 1, None

    def leave(self, row: int) -> None:
        """One row less: the last one takes its place."""
        self.n -= 1
        for part in (self._seeds, self._count, self._seen):
            part[row] = part[self.n]
        last = self._options.pop()
        if row != self.n:
            self._options[row] = last
        self._groups = None

    def seen(self, row: int) -> Tensor:
        """The tokens that a text holds by now, [V] bool, a copy."""
        return self._seen[row].clone()

    def draw(self, logits: Tensor) -> Tensor:
        """A token of every row, by logits [n, V]: a record [n, 3] float64 as `Sampler.record`."""
        numbers = uniforms(self._seeds[: self.n], NUMBERS_PER_TOKEN * self._count[: self.n])
        seen = self._seen[: self.n]
        groups = self._by_options()
        if len(groups) == 1:
            tokens = draw(logits, seen, self._options[0], numbers)
        else:
            tokens = torch.zeros(self.n, dtype=torch.int64, device=logits.device)
            for options, rows in groups.items():
                tokens[rows] = draw(logits[rows], seen[rows], options, numbers[rows])
        finite = logits.isfinite().all(-1)
        seen.scatter_(1, tokens[:, None], True)
        self._count[: self.n] += 1
        return step_record(torch.where(finite, tokens, -1), tokens, logits)

    def _by_options(self) -> dict[SamplingOptions, Tensor]:
        if self._groups is None:
            rows: dict[SamplingOptions, list[int]] = {}
            for row, options in enumerate(self._options):
                rows.setdefault(options, []).append(row)
            self._groups = {
                options: torch.tensor(part, device=self._seeds.device)
                for options, part in rows.items()
            }
        return self._groups
