"""Windows of tokens, and examples, in the order in which training reads them.

All orders are pure functions of the step, so a resumed run reads the same batches without any
saved state. A batch is what one optimizer step reads, whatever the size of the forward passes in
which it does so: 1 of 8 windows, 2 of 4 and 8 of 1 train and validate on the same text.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wavelet_lm.config import Config, TrainingConfig
from wavelet_lm.errors import UserError

ALL = slice(None)
# How far back a passage that comes again may stand, where windows know what was before them.
WINDOWS_BACK = 16


class Batches(Protocol):
    """`batches[i]` is what step i reads: tokens and next tokens, int64 [B, block_size] each."""

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]: ...

    def starts_text(self, step: int) -> bool:
        """Whether the windows of this step do not continue those of the step before it."""
        ...


class RandomCrops:
    """Windows at positions drawn independently for each step from (seed, step).

    Args:
        repeated: share of the windows in which a passage comes a second time (`repeat_passage`).
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        block_size: int,
        seed: int,
        own: slice = ALL,
        repeated: float = 0.0,
    ):
        _require_tokens(tokens, block_size + 1, block_size)
        self.tokens, self.seed, self.own = tokens, seed, own
        self.batch_size, self.block_size, self.repeated = batch_size, block_size, repeated

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        generator = np.random.default_rng((self.seed, step))
        starts = generator.integers(len(self.tokens) - self.block_size, size=self.batch_size)
        windows = windows_at(self.tokens, starts[self.own], self.block_size + 1)
        if self.repeated:
            # Drawn for all windows, so that those of a process are the same beside any others.
            draws = generator.random((self.batch_size, 4))[self.own]
            for window, (chance, *draw) in zip(windows, draws, strict=True):
                if chance < self.repeated:
                    repeat_passage(window, draw)
        return with_targets(windows)

    def starts_text(self, step: int) -> bool:
        """Always: crops have nothing to do with one another."""
        return True


class SequentialStreams:
    """The text cut into `batch_size` parts that are read side by side, window after window.

    Args:
        repeated: share of the windows in whose second half a passage of a first half comes again,
            so that what is repeated is never what was written over.
        windows_back: how many windows before its own that first half may be; the logarithm of that
            many and two is drawn evenly.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        batch_size: int,
        block_size: int,
        seed: int,
        own: slice = ALL,
        repeated: float = 0.0,
        windows_back: int = 0,
    ):
        _require_tokens(tokens, batch_size * block_size + 1, block_size)
        self.tokens, self.seed, self.own = tokens, seed, own
        self.batch_size, self.block_size = batch_size, block_size
        self.repeated, self.windows_back = repeated, windows_back
        stream_length = (len(tokens) - 1) // batch_size
        self.starts = (np.arange(batch_size) * stream_length)[own]
        self.n_windows = stream_length // block_size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        T, number = self.block_size, step % self.n_windows
        starts = self.starts + number * T
        windows = windows_at(self.tokens, starts, T + 1)
        if self.repeated:
            generator = np.random.default_rng((self.seed, step))
            # Drawn for all windows, so that those of a process are the same beside any others.
            draws = generator.random((self.batch_size, 5))[self.own]
            for window, start, (chance, far, *draw) in zip(windows, starts, draws, strict=True):
                if chance < self.repeated:
                    back = min(number, int((self.windows_back + 2) ** far) - 1)
                    earlier = self.tokens[start - back * T : start - back * T + T // 2]
                    repeat_earlier(window[:T], earlier, draw)
        return with_targets(windows)

    def starts_text(self, step: int) -> bool:
        """Where the streams have come to their end and begin again."""
        return step % self.n_windows == 0


class ShuffledExamples:
    """Numbers of examples without end: all in a random order, again in another, and so on.

    `examples[step]` are the `batch_size` numbers [batch_size] that a step reads.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, step: int) -> np.ndarray:
        parts, first, left = [], step * self.batch_size, self.batch_size
        while left:
            epoch, place = divmod(first, self.n)
            if epoch != self._epoch:
                generator = np.random.default_rng((self.seed, epoch))
                self._epoch, self._order = epoch, generator.permutation(self.n)
            parts.append(self._order[place : place + left])
            first, left = first + len(parts[-1]), left - len(parts[-1])
        return np.concatenate(parts)


def batch_size(config: TrainingConfig) -> int:
    """Windows of one optimizer step."""
    return config.micro_batch_size * config.grad_accum


def passes_per_step(config: TrainingConfig, n_processes: int = 1) -> int:
    """Forward passes of each of so many processes in a step: as few as there can be, all as large.

    Raises:
        UserError: the windows of a step cannot be shared out evenly.
    """
    windows, left = divmod(batch_size(config), n_processes)
    if left:
        raise UserError(
            f"a step reads micro_batch_size ({config.micro_batch_size}) · grad_accum"
            f" ({config.grad_accum}) = {batch_size(config)} windows, which {n_processes} processes"
            " cannot share evenly; give a multiple"
        )
    fewest = -(-windows // config.micro_batch_size)
    return next(n for n in range(fewest, windows + 1) if windows % n == 0)


def training_batches(config: Config, tokens: np.ndarray, own: slice = ALL) -> Batches:
    """The batches of a config's `data_order`; tokens: [N] of any integer dtype.

    Args:
        own: which windows of each batch this process reads.
    """
    shape = batch_size(config), config.block_size
    options = config.seed, own, config.repeated_passages
    if config.data_order == "sequential":
        windows_back = WINDOWS_BACK if config.carry_state else 0
        return SequentialStreams(tokens, *shape, *options, windows_back)
    return RandomCrops(tokens, *shape, *options)


def validation_batches(config: Config, tokens: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """`own_validation_batches` of one process, which reads them all: int64 [windows, T] each."""
    return own_validation_batches(config, tokens, 0, 1)[0]


def own_validation_batches(
    config: Config, tokens: np.ndarray, rank: int, size: int
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """The evenly spaced windows of `eval_batches` batches; fewer where the text is short.

    They come in forward passes of up to `micro_batch_size` windows: inputs and targets, each
    [windows, T] int64. Raises UserError for a split of fewer than 2 tokens.

    Args:
        rank, size: of this process, which reads its part of the windows.

    Returns:
        The passes, as many in every process, and how many windows of them count: where processes
        cannot share them evenly, the last ones read one again.
    """
    n_targets = len(tokens) - 1
    if n_targets < 1:
        raise UserError(
            f"the validation split has {len(tokens)} token; give more text or change split"
        )
    block_size = min(config.block_size, n_targets)
    n_windows = min(config.eval_batches * batch_size(config), n_targets // block_size)
    starts = np.linspace(0, n_targets - block_size, n_windows).astype(np.int64)
    most = -(-n_windows // size)
    own = starts[np.minimum(np.arange(rank * most, (rank + 1) * most), n_windows - 1)]
    n_passes = -(-most // config.micro_batch_size)
    passes = [cut(tokens, part, block_size) for part in np.array_split(own, n_passes)]
    return passes, min(most, max(0, n_windows - rank * most))


def steps_per_epoch(config: Config, n_tokens: int) -> int:
    """⌊tokens / (batch · block_size)⌋, at least 1."""
    return max(1, n_tokens // (batch_size(config) * config.block_size))


def cut(tokens: np.ndarray, starts: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
    """Windows of `block_size` tokens at `starts` [B], and the tokens that follow each position.

    Both are [B, block_size] int64, whatever integers `tokens` [N] are.
    """
    return with_targets(windows_at(tokens, starts, block_size + 1))


def windows_at(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """[B, length] int64, whatever integers `tokens` [N] are."""
    return np.stack([tokens[s : s + length] for s in starts]).astype(np.int64)


def with_targets(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """All but the last token of windows [B, T + 1], and all but the first: [B, T] each."""
    both = torch.from_numpy(windows)
    return both[:, :-1], both[:, 1:]


def repeat_passage(window: np.ndarray, draw: Sequence[float]) -> None:
    """Write an eighth to a half of a window a second time over what follows it there.

    Args:
        window: [T] tokens, changed in place.
        draw: three numbers in [0, 1): how long the passage is, where it stands, and where it comes
            again.
    """
    T = len(window)
    length = T // 8 + int(draw[0] * (T // 2 - T // 8 + 1))
    first = int(draw[1] * (T - 2 * length + 1))
    again = first + length + int(draw[2] * (T - 2 * length - first + 1))
    window[again : again + length] = window[first : first + length]


def repeat_earlier(window: np.ndarray, earlier: np.ndarray, draw: Sequence[float]) -> None:
    """Write a passage, an eighth to a half of a window, over a part of the window's second half.

    Args:
        window: [T] tokens, changed in place.
        earlier: [T // 2], where the passage stands.
        draw: three numbers in [0, 1): how long it is, where it stands, and where it comes again.
    """
    T, half = len(window), len(earlier)
    length = T // 8 + int(draw[0] * (half - T // 8 + 1))
    first = int(draw[1] * (half - length + 1))
    again = half + int(draw[2] * (T - half - length + 1))
    window[again : again + length] = earlier[first : first + length]


def _require_tokens(tokens: np.ndarray, needed: int, block_size: int) -> None:
    if len(tokens) < needed:
        raise UserError(
            f"the training split has {len(tokens)} tokens but a batch needs at least {needed};"
            f" give more text or lower block_size (now {block_size})"
        )
