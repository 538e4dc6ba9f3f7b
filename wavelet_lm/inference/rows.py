"""One text of a batch as it grows: from tokens to what is shown of them, and when it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from wavelet_lm.inference.checks import check_seed, check_stop, check_whole
from wavelet_lm.inference.generation import Drawn, TextStream
from wavelet_lm.inference.strategies.speculative import Counts
from wavelet_lm.inference.text.metrics import text_metrics
from wavelet_lm.inference.text.spacing import CleanContinuation

if TYPE_CHECKING:
    from wavelet_lm.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Request:
    """One text to write: up to `num_tokens` tokens, or up to (and without) a text of `stop`."""

    seed: int
    num_tokens: int
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_whole("num_tokens", self.num_tokens, 0)
        check_stop(self.stop)


class Timings(NamedTuple):
    """Seconds of one completion; `start` runs to the second token, `decode` from there on.

    The first step is a slow one where it is compiled or captured, so it is kept apart.
    """

    start_seconds: float
    decode_seconds: float


@dataclass
class Completion:
    """A finished text.

    Attributes:
        seed: that it was drawn with.
        text: what it says, without the prompt, the stop text, and the end-of-text token.
        tokens: all that were drawn, with those of the stop text, without the end-of-text token.
        log_probs, entropies: of each token, in nats, of the model's raw distribution.
        reason: why it ended: `length`, `end_of_text`, `stop`, `interrupted`.
        metrics: figures of the text (`metrics.py`).
        timings: how long it took.
        counts: of the draft model's tokens, where there is one.
    """

    seed: int
    text: str
    tokens: list[int]
    log_probs: list[float]
    entropies: list[float]
    reason: str
    metrics: dict[str, float | int | None]
    timings: Timings
    counts: Counts | None = None

    @property
    def mean_log_prob(self) -> float:
        """−∞ for a text without tokens."""
        return math.fsum(self.log_probs) / len(self.tokens) if self.tokens else -math.inf


class Row:
    """One text as it grows.

    What is shown is what counts: stop texts are looked for in the text after it was cleaned.

    Args:
        request: what was asked for.
        tokenizer: turns tokens into text.
        end_of_text: the token that ends the text; None = go on after it.
        clean_after: undo the spacing of tokenized corpora (`spacing.py`), for a text that goes on
            after this beginning of a line; None = leave it.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        end_of_text: int | None,
        clean_after: str | None = None,
    ):
        self._request, self._end_of_text = request, end_of_text
        self._decoded, self._until = TextStream(tokenizer), TextUntil(request.stop)
        self._cleaned = None if clean_after is None else CleanContinuation(clean_after)
        # What stop texts have in the line that they end in; where that is nothing, the line's end
        # has come.
        ends = (stop.rpartition("\n")[2] for stop in request.stop)
        self._line_stops = tuple(filter(None, ends))
        self._pieces: list[str] = []
        self._started = self._second = self._last = time.perf_counter()
        self.drawn: list[Drawn] = []
        self.reason: str | None = None
        if request.num_tokens == 0:
            self.end("length")

    @property
    def tokens(self) -> list[int]:
        """Those drawn so far."""
        return [drawn.token for drawn in self.drawn]

    def take(self, drawn: Drawn) -> str:
        """One more token; returns the text that can be shown now."""
        self._last = time.perf_counter()
        if len(self.drawn) < 2:
            self._second = self._last
        if drawn.token == self._end_of_text:
            return self.end("end_of_text")
        self.drawn.append(drawn)
        shown = self._show(self._certain(self._decoded.feed(drawn.token)))
        if self._until.found:
            return shown + self.end("stop")
        if len(self.drawn) == self._request.num_tokens:
            return shown + self.end("length")
        return shown

    def end(self, reason: str) -> str:
        """Nothing more comes; returns the rest of the text."""
        rest = self._decoded.finish()
        if self._cleaned is not None:
            rest = self._cleaned.feed(rest) + self._cleaned.finish()
        shown = self._show(self._until.feed(rest) + self._until.finish())
        found = self._until.found and reason != "interrupted"
        self.reason = "stop" if found else reason
        return shown

    def _certain(self, piece: str) -> str:
        """What can be shown of the text now that this piece of it was decoded."""
        if self._cleaned is None:
            return self._until.feed(piece)
        shown = self._until.feed(self._cleaned.feed(piece))
        settled = self._cleaned.settled(self._line_stops)
        if self._until.is_in(settled):
            shown += self._until.feed(settled)
        return shown

    def _show(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece

    def completion(self, drift: float, counts: Counts | None = None) -> Completion:
        """The text as it stands, with its measures; `drift` and `counts` are the strategy's."""
        tokens = self.tokens
        log_probs = [drawn.log_prob for drawn in self.drawn]
        entropies = [drawn.entropy for drawn in self.drawn]
        return Completion(
            self._request.seed,
            "".join(self._pieces),
            tokens,
            log_probs,
            entropies,
            self.reason,
            text_metrics(tokens, log_probs, entropies, drift),
            Timings(self._second - self._started, self._last - self._second),
            counts,
        )


class TextUntil:
    """Text as it comes, up to the first of some stop texts.

    The one that is complete first counts; of several that are complete at once, the longest. What
    may be the beginning of one is held back.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """The text that is certain by now; nothing once a stop text was found."""
        if self.found or not self._stop:
            return "" if self.found else piece
        text = self._held + piece
        hits = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)[1]]
        n_held = next(n for n in range(len(text), -1, -1) if self._may_stop(text[len(text) - n :]))
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def _may_stop(self, end: str) -> bool:
        return not end or any(s.startswith(end) for s in self._stop)

    def is_in(self, text: str) -> bool:
        """Whether a stop text would be found once this text was fed."""
        text = self._held + text
        return not self.found and any(s in text for s in self._stop)

    def finish(self) -> str:
        """What was held back."""
        rest, self._held = self._held, ""
        return rest
