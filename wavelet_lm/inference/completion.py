"""Requests in, completions out: every strategy of generation over the same engine.

A `Writer` reads texts (`read` gives a `Reading`, which nothing ever changes) and continues them
(`write` gives a `Completion` for every `Request`). Rows of a batch have their own length, seed and
stop conditions. What text is shown as it comes, and where, is the caller's affair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from wavelet_lm.compiler import compiled_or_plain, first_that_compiles
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import Drawn, check_vocabulary, sampled_tokens
from wavelet_lm.inference.interrupts import ctrl_c_as_flag
from wavelet_lm.inference.reading import Reading
from wavelet_lm.inference.rows import Completion, Request, Row
from wavelet_lm.inference.sampling.coherence import CoherenceOptions, WaveletCoherence
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.inference.state_file import ModelRecord, Past, load_state, save_state
from wavelet_lm.inference.strategies.lookahead import lookahead_tokens
from wavelet_lm.inference.strategies.speculative import Counts, speculative_tokens
from wavelet_lm.models.wavelet_lm.memory import learning

if TYPE_CHECKING:
    from wavelet_lm.data.tokenizers import Tokenizer

# As far back the line is looked for that a text goes on with.
LINE_TOKENS = 256
# Gets the row of a batch and the text that it has grown by.
Show = Callable[[int, str], object]


# The row of a batch and the text that it has grown by; the completions at its end.
Pieces: TypeAlias = "Generator[tuple[int, str], None, list[Completion]]"


@dataclass(frozen=True)
class Strategy:
    """How texts are continued.

    Attributes:
        sampling: how a token is drawn.
        lookahead_k: candidates that are rolled out for every token (`lookahead.py`); 0 = none.
        lookahead_depth: tokens that each of them is rolled out for.
        best_of_n: texts that are written for each one that is kept.
        batch_size: how many of those are written side by side.
        coherence: lowers top_p; None = no.
        draft_tokens: tokens that the draft model, where there is one, proposes at once.
        clean_spacing: undo the spacing of tokenized corpora such as WikiText.
        ignore_eot: go on after an end of text.
    """

    sampling: SamplingOptions = SamplingOptions()  # noqa: RUF009  (frozen)
    lookahead_k: int = 0
    lookahead_depth: int = 0
    best_of_n: int = 1
    batch_size: int = 16
    coherence: CoherenceOptions | None = None
    draft_tokens: int = 4
    clean_spacing: bool = False
    ignore_eot: bool = False


class Writer:
    """A model, its tokenizer and a strategy, ready to read and to write.

    Args:
        decoder: of the model that writes.
        model: that model, or what is known of it where it was let go.
        tokenizer: the model's.
        strategy: how texts are continued.
        draft: a smaller model with the same tokenizer, for speculative decoding.
        auto_compile: where compilation fails, go on without, and say so.
        log: gets lines about what is going on.

    Raises:
        UserError: the tokenizer is not the model's.
    """

    def __init__(
        self,
        decoder: Decoder,
        model: nn.Module | ModelRecord,
        tokenizer: Tokenizer,
        strategy: Strategy,
        draft: Decoder | None = None,
        *,
        auto_compile: bool = False,
        log: Callable[[str], object] = lambda line: None,
    ):
        check_vocabulary(model, tokenizer)
        self.decoder, self.model, self.tokenizer = decoder, model, tokenizer
        self.strategy, self.draft = strategy, draft
        self._auto_compile, self._log = auto_compile, log
        self._announced = False

    # --- reading ---------------------------------------------------------------------------------

    def read(self, texts: Sequence[Sequence[int]], before: Reading | None = None) -> Reading:
        """Read one text per row (1 or more tokens), or go on with the rows of `before`."""
        started = time.perf_counter()
        old = [[]] * len(texts) if before is None else before.texts
        whole = [[*a, *b] for a, b in zip(old, texts, strict=True)]
        pasts = () if before is None else before.pasts
        for decoder in filter(None, (self.decoder, self.draft)):
            decoder.check_length(max(Reading(whole, None, None, pasts=pasts).lengths))
        logits, state = self.decoder.prefill(texts, None if before is None else before.state)
        draft = None
        if self.draft is not None:
            known = None if before is None else before.draft
            draft = self.draft.prefill(texts, None if known is None else known[1])
        self._synchronize()
        n_tokens = sum(map(len, texts))
        seconds = time.perf_counter() - started
        return Reading(whole, logits, state, draft, n_tokens, seconds, pasts)

    def read_written(self, before: Reading, tokens: Sequence[int]) -> Reading:
        """A text of one row after it has been continued by `tokens` (1 or more).

        Fast weights that adapt learn from them once more as they did when they were written.
        """
        if not self.decoder.adapts:
            return self.read([tokens], before)
        started = time.perf_counter()
        session = self.decoder.start(before.state)
        for token in tokens:
            logits = session.decode(torch.tensor([[token]], device=self.decoder.device))
        seconds = time.perf_counter() - started
        text = [*before.texts[0], *tokens]
        read = [text], logits[:, -1], session.state(), None, len(tokens), seconds
        return Reading(*read, before.pasts)

    def fork(self, reading: Reading, rows: Sequence[int]) -> Reading:
        """These rows of a reading; a row may come more than once."""
        draft = reading.draft
        if draft is not None:
            draft = draft[0][list(rows)], self.draft.rows(draft[1], rows)
        return reading._replace(
            texts=[reading.texts[row] for row in rows],
            logits=reading.logits[list(rows)],
            state=self.decoder.rows(reading.state, rows),
            draft=draft,
            pasts=tuple(reading.pasts[row] for row in rows) if reading.pasts else (),
        )

    def save(self, path: str | Path, reading: Reading, whole: bool = False) -> None:
        """Keep the state of one text that was read; with `whole` all of its tokens."""
        state = self._in_use(reading.state)
        past = reading.pasts[0] if reading.pasts else Past()
        save_state(path, state, reading.logits, reading.texts[0], self.model, past, whole)

    def load(self, path: str | Path) -> Reading:
        """A text that was read and saved by the same model, which may be known by its end alone.

        A draft, whose proposals are checked anyway, reads that end.

        Raises:
            UserError: the file is no state, or one of another model or of other options.
        """
        template = self._in_use(self.decoder.prefill([[0]])[1])
        logits, state, text, past = load_state(path, self.model, template, self.decoder.device)
        draft = None if self.draft is None else self.draft.prefill([text])
        return Reading([text], logits, state, draft, pasts=(past,) if past.n else ())

    def _in_use(self, state: Any) -> Any:
        """The state with fast weights where they will learn, whether or not they have begun to."""
        return learning(state) if self.decoder.adapts else state

    # --- writing ---------------------------------------------------------------------------------

    def write(
        self,
        reading: Reading,
        requests: Sequence[Request],
        show: Show = lambda row, piece: None,
    ) -> list[Completion]:
        """Continue every text that was read, one request per row.

        `show` gets each row's text as it comes (with `best_of_n`, when the best one is known).
        Ctrl-C ends all texts where they are, instead of raising: their reason is `interrupted`, and
        of rows that had not begun there is no completion.

        Raises:
            NonFiniteOutput: where the model's logits are.
            UserError: the compiler failed, or a text would be longer than the model can read.
        """
        with ctrl_c_as_flag() as pressed:
            pieces = self.pieces(reading, requests, pressed)
            while True:
                try:
                    row, piece = next(pieces)
                except StopIteration as end:
                    return end.value
                show(row, piece)

    def pieces(
        self, reading: Reading, requests: Sequence[Request], pressed: Sequence[int] = ()
    ) -> Pieces:
        """As `write`: the pieces as they come, and the completions as the generator's value.

        pressed: all texts end where they are once there is something in it.
        """
        self.check_lengths(reading.lengths, requests)
        if self.strategy.best_of_n > 1:
            return self._write_best(reading, requests, pressed)
        return self._write_rows(reading, requests, pressed)

    def check_lengths(self, lengths: Sequence[int], requests: Sequence[Request]) -> None:
        """Raise `UserError` where a text and what is asked for is more than the models can read.

        lengths: how many tokens each text has so far.
        """
        for length, request in zip(lengths, requests, strict=True):
            # The last token is not read any more; looking ahead reads on after it.
            n_read = length + request.num_tokens - 1 + self.strategy.lookahead_depth
            for decoder in filter(None, (self.decoder, self.draft)):
                decoder.check_length(n_read)

    def _write_best(
        self, reading: Reading, requests: Sequence[Request], pressed: Sequence[int]
    ) -> Pieces:
        n, best = self.strategy.best_of_n, []
        for row, request in enumerate(requests):
            tries = [replace(request, seed=request.seed + i) for i in range(n)]
            found: list[Completion] = []
            while len(found) < n and not pressed:
                group = tries[len(found) :][: self.strategy.batch_size]
                forks = self.fork(reading, [row] * len(group))
                found += yield from _as_row(None, self._write_rows(forks, group, pressed))
            if not found:
                break
            best.append(max(found, key=lambda completion: completion.mean_log_prob))
            figures = ", ".join(f"{c.seed}: {c.mean_log_prob:.4f}" for c in found)
            self._log(f"best of {n}: seed {best[-1].seed}; mean log-probabilities {figures}")
            yield row, best[-1].text
        return best

    def _write_rows(
        self, reading: Reading, requests: Sequence[Request], pressed: Sequence[int]
    ) -> Pieces:
        if len(requests) == 1 or self.draft is None:
            return (yield from self._write_batch(reading, requests, pressed))
        completions = []  # a draft writes one text at a time
        for row, request in enumerate(requests):
            if not pressed:
                alone = self.fork(reading, [row])
                pieces = self._write_batch(alone, [request], pressed)
                completions += yield from _as_row(row, pieces)
        return completions

    def _write_batch(
        self, reading: Reading, requests: Sequence[Request], pressed: Sequence[int]
    ) -> Pieces:
        end_of_text = None if self.strategy.ignore_eot else self.tokenizer.end_of_text
        clean_after = map(self._line_before, reading.texts)
        rows = [
            Row(request, self.tokenizer, end_of_text, before)
            for request, before in zip(requests, clean_after, strict=True)
        ]
        coherence = self._coherence(reading)
        counts = Counts() if self.draft is not None else None
        if any(row.reason is None for row in rows):
            for step in self._steps(reading, requests, coherence, counts):
                for i, (row, drawn) in enumerate(zip(rows, step, strict=True)):
                    if row.reason is None:
                        yield i, row.take(drawn)
                for i, row in enumerate(rows) if pressed else ():
                    if row.reason is None:
                        yield i, row.end("interrupted")
                if all(row.reason for row in rows):
                    break
        texts = [text + row.tokens for text, row in zip(reading.texts, rows, strict=True)]
        drifts = coherence.drift(texts).tolist()
        return [row.completion(drift, counts) for row, drift in zip(rows, drifts, strict=True)]

    def _line_before(self, text: Sequence[int]) -> str | None:
        """Where text is cleaned, the beginning of the line that it goes on with."""
        if not self.strategy.clean_spacing:
            return None
        return self.tokenizer.decode(text[-LINE_TOKENS:]).rpartition("\n")[2]

    def _coherence(self, reading: Reading) -> WaveletCoherence:
        options = self.strategy.coherence or CoherenceOptions()
        return WaveletCoherence(
            self.decoder.vectors,
            reading.texts,
            self.strategy.sampling.top_p,
            options.weight,
            options.window,
            options.levels,
        )

    def _steps(
        self,
        reading: Reading,
        requests: Sequence[Request],
        coherence: WaveletCoherence,
        counts: Counts | None,
    ) -> Iterator[list[Drawn]]:
        """Like `_drawn`; a compiler that fails does so before anything is yielded."""
        decoders = [*filter(None, (self.decoder, self.draft))]

        def begun(n: int) -> tuple[list[list[Drawn]], Iterator[list[Drawn]]]:
            """The first n steps, and those that follow."""
            steps = self._drawn(reading, requests, coherence, counts)
            return list(islice(steps, n)), steps

        def merging(options: dict[str, Any]) -> tuple[list[list[Drawn]], Iterator[list[Drawn]]]:
            for decoder in decoders:
                decoder.merging = options
            return begun(2)  # the second token is the first one of a step

        def compiled() -> tuple[list[list[Drawn]], Iterator[list[Drawn]]]:
            options = [self.decoder.merging, {}] if self.decoder.merging else [{}]
            return first_that_compiles(merging, options, self._log)

        def plain() -> tuple[list[list[Drawn]], Iterator[list[Drawn]]]:
            for decoder in decoders:
                decoder.compile = False
            return begun(0)

        if not self.decoder.compile:
            first, steps = begun(0)
        else:
            if not self._announced:
                self._log("compiling a step; the first one takes a minute or more")
                self._announced = True
            first, steps = compiled_or_plain(
                compiled,
                plain,
                required=not self._auto_compile,
                way_out="--compile false",
                log=self._log,
            )
        yield from first
        yield from steps

    def _drawn(
        self,
        reading: Reading,
        requests: Sequence[Request],
        coherence: WaveletCoherence,
        counts: Counts | None,
    ) -> Iterator[list[Drawn]]:
        strategy, seeds = self.strategy, [request.seed for request in requests]
        source = coherence if strategy.coherence else None
        seen = [past.seen for past in reading.pasts]
        if self.draft is not None:
            tokens = speculative_tokens(
                self.decoder,
                self.draft,
                reading.texts[0],
                (reading.logits, reading.state),
                reading.draft,
                strategy.sampling,
                seeds[0],
                strategy.draft_tokens,
                counts,
                source,
                seen,
            )
            return ([drawn] for drawn in tokens)
        start = self.decoder, reading.logits, reading.state, reading.texts
        if strategy.lookahead_k:
            k, depth = strategy.lookahead_k, strategy.lookahead_depth
            return lookahead_tokens(*start, strategy.sampling, seeds, k, depth, source, seen)
        return sampled_tokens(*start, strategy.sampling, seeds, source, seen)

    def _synchronize(self) -> None:
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)


def _as_row(row: int | None, pieces: Pieces) -> Pieces:
    """The pieces of one text as those of another row; none at all for None."""
    while True:
        try:
            _, piece = next(pieces)
        except StopIteration as end:
            return end.value
        if row is not None:
            yield row, piece
