"""What is asked of the scheduler, and what it tells of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from wavelet_lm.inference.generation import Drawn
from wavelet_lm.inference.rows import Row
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.serving.known import Known

# Of a token: the likeliest ones in its place with their log-probabilities (nats).
Alternatives = list[tuple[int, float]]


class Written(NamedTuple):
    """What a token added to a text.

    Attributes:
        choice: the number of the text among those of its job.
        piece: what can be shown now, which may be nothing.
        drawn: the token; None where the text ends without one.
        alternatives: as many as were asked for.
        reason: why the text ends here, None where it goes on.
    """

    choice: int
    piece: str
    drawn: Drawn | None
    alternatives: Alternatives
    reason: str | None


@dataclass(eq=False)
class Choice:
    """One text to be written.

    Attributes:
        row: the text as it grows.
        seed, options: how its tokens are drawn.
        n_alternatives: how many are told of each token.
    """

    row: Row
    seed: int
    options: SamplingOptions
    n_alternatives: int = 0


@dataclass(eq=False)
class Job:
    """A prompt to be read, and the texts that follow it.

    Attributes:
        tokens: of the prompt, one or more where nothing comes before it.
        choices: the texts; none: the prompt is read, and that is all.
        start: a saved state that the prompt follows.
        keeps: whether the state after the first choice is wanted.
        tell: is called in the scheduler's thread whenever there is something new.
        n_cached: tokens of the prompt that were not read again, once that is known.
        known: the text after the prompt, once it is read; with `keeps` after the answer, once that
            is written.
        error: why the job failed.
        done: whether nothing more comes.
    """

    tokens: Sequence[int]
    choices: list[Choice] = field(default_factory=list)
    start: Known | None = None
    keeps: bool = False
    tell: Callable[[Job, list[Any]], object] = lambda job, written: None
    n_cached: int = 0
    known: Known | None = None
    error: Exception | None = None
    done: bool = False
