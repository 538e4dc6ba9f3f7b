"""Many texts at once: prompts are read in chunks between the steps in which all texts grow.

One thread owns the model. It goes round: orders (new jobs, and those to end), some reading, one
step. Reading takes about as long as the last step did, a chunk of each waiting prompt in turn, so
that no text stalls and no prompt waits for a longer one. A text that ends leaves the batch before
the next step, and its place is free.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import Drawn, NonFiniteOutput
from wavelet_lm.inference.rolling import RollingSampler, rolling_batch
from wavelet_lm.inference.state_file import LAST
from wavelet_lm.serving.job import Alternatives, Choice, Job, Written
from wavelet_lm.serving.known import Known, Layout
from wavelet_lm.serving.state_cache import Prefix, StateCache, root_of

# Tokens of a prompt that are read at once; where they are cut does not depend on what is cached.
CHUNK = 256
# After so many tokens of a prompt its state is kept, beside that at its end.
KEPT_EVERY = 1024


@dataclass(eq=False)
class Reading:
    """A prompt on its way: `at` tokens of it are in `state` and `logits`."""

    job: Job
    prefix: Prefix
    at: int
    n_before: int
    state: Any
    logits: Tensor | None
    seen: Tensor


@dataclass(eq=False)
class Writing:
    """A text in the batch; `prefix` is of the prompt, `last` the end of the text at its end."""

    job: Job
    number: int
    choice: Choice
    prefix: Prefix
    n: int
    last: tuple[int, ...]


class Scheduler:
    """Reads and writes for all jobs, in a thread of its own.

    Args:
        decoder: its fast weights rest.
        cache: what is known of beginnings.
        log: gets a line where something is wrong with the model or the program.

    Attributes:
        figures: what was done so far: `read`, `cached` and `written` tokens, `steps`, `seconds`
            of steps and `rows` of all of them.
        layout: how a state is kept.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: StateCache,
        log: Callable[[str], object] = lambda line: None,
    ):
        self.decoder, self.cache, self._log = decoder, cache, log
        self.layout = Layout(decoder)
        self.figures: Counter[str] = Counter()
        self._orders: deque[tuple[Job, str | None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._reading: deque[Reading] = deque()
        self._writing: list[Writing] = []
        self._empty()
        self._step_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job; from any thread, as all that follow."""
        self._orders.append((job, None))
        self._wake.set()

    def end(self, job: Job, reason: str) -> None:
        """End its texts where they are; one that is not read yet is not read on."""
        self._orders.append((job, reason))
        self._wake.set()

    def close(self) -> None:
        """End when all that was ordered is done, and wait for that."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    @property
    def n_reading(self) -> int:
        """Prompts that are being read."""
        return len(self._reading)

    @property
    def n_writing(self) -> int:
        """Texts that are being written."""
        return len(self._writing)

    # --- the round -------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if not (self._orders or self._reading or self._writing):
                if self._closing:
                    return
                self._wake.wait()
            self._wake.clear()
            self.turn()

    @torch.inference_mode()
    def turn(self) -> None:
        """Orders, reading, and a step; what goes wrong ends the jobs that it concerns."""
        while self._orders:
            job, reason = self._orders.popleft()
            if reason is None:
                self._guarded(job, self._begin, job)
            else:
                self._guarded(job, self._end, job, reason)
        self._read()
        if self._writing:
            try:
                self._step()
            except Exception as error:
                self._log(f"a step failed: {error!r}")
                jobs = {writing.job: None for writing in self._writing}
                self._writing.clear()
                self._empty()
                for job in jobs:
                    self._fail(job, error)

    def _empty(self) -> None:
        self._batch = rolling_batch(self.decoder)
        self._sampler = RollingSampler(self.decoder.vocab_size, self.decoder.device)
        self._logits = torch.zeros(0, self.decoder.vocab_size, device=self.decoder.device)

    def _guarded(self, job: Job, action: Callable[..., object], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:
            self._log(f"a text failed: {error!r}")
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        self._forget(job)
        job.error, job.done = error, True
        job.tell(job, [])

    def _forget(self, job: Job) -> None:
        self._reading = deque(r for r in self._reading if r.job is not job)
        for row in reversed(range(len(self._writing))):
            if self._writing[row].job is job:
                self._leave(row)

    def _end(self, job: Job, reason: str) -> None:
        """As `end`; a job that is done already stays as it was."""
        if job.done:
            return
        for row, writing in enumerate(self._writing):
            if writing.job is job and job.keeps:
                job.known = self._so_far(row)
        self._forget(job)
        written = [
            Written(number, choice.row.end(reason), None, [], choice.row.reason)
            for number, choice in enumerate(job.choices)
            if choice.row.reason is None
        ]
        job.done = True
        job.tell(job, written)

    # --- reading ---------------------------------------------------------------------------------

    def _begin(self, job: Job) -> None:
        start, V = job.start, self.decoder.vocab_size
        root = b"" if start is None else root_of(start)
        found = self.cache.longest(job.tokens, root)
        known, at = (start, 0) if found is None else found
        if known is None:
            state, logits, seen = None, None, torch.zeros(V, dtype=torch.bool)
        else:
            state, logits = self.layout.unpack(known)
            seen = known.seen_tokens(V)
        prefix = Prefix(root)
        prefix.add(job.tokens[:at])
        job.n_cached = at
        self.figures["cached"] += at
        n_before = 0 if start is None else start.n
        reading = Reading(job, prefix, at, n_before, state, logits, seen)
        if at < len(job.tokens):
            self._reading.append(reading)
        else:
            self._has_read(reading)

    def _read(self) -> None:
        """Chunks of the prompts in turn, for about as long as a step takes, one at least."""
        until = time.perf_counter() + self._step_seconds
        while self._reading:
            reading = self._reading.popleft()
            self._guarded(reading.job, self._read_chunk, reading)
            if time.perf_counter() >= until:
                return

    def _read_chunk(self, reading: Reading) -> None:
        job, place = reading.job, reading.n_before + reading.at
        end = min(len(job.tokens), reading.at + CHUNK - place % CHUNK)
        chunk = job.tokens[reading.at : end]
        idx = torch.tensor([chunk], device=self.decoder.device)
        logits, reading.state = self.decoder.read(idx, reading.state, last_only=True)
        reading.logits, reading.at = logits[:, -1], end
        reading.seen[idx[0].cpu()] = True
        reading.prefix.add(chunk)
        self.figures["read"] += len(chunk)
        if end == len(job.tokens):
            self._has_read(reading)
            return
        if end % KEPT_EVERY == 0:
            self.cache.keep(reading.prefix, self._known_of(reading))
        self._reading.append(reading)

    def _known_of(self, reading: Reading) -> Known:
        start = reading.job.start
        last = (*(() if start is None else start.last), *reading.job.tokens[: reading.at][-LAST:])
        n = reading.n_before + reading.at
        return self.layout.pack(reading.state, reading.logits, n, last, reading.seen)

    def _has_read(self, reading: Reading) -> None:
        job = reading.job
        if not bool(reading.logits.isfinite().all()):
            raise NonFiniteOutput(1)
        job.known = self._known_of(reading)
        self.cache.keep(reading.prefix, job.known)
        for number, choice in enumerate(job.choices):
            if choice.row.reason is None:
                self._batch.join(reading.state)
                self._sampler.join(choice.options, choice.seed, reading.seen)
                self._logits = torch.cat((self._logits, reading.logits))
                place = (reading.prefix.copy(), job.known.n, job.known.last)
                self._writing.append(Writing(job, number, choice, *place))
        job.done = all(choice.row.reason is not None for choice in job.choices)
        job.tell(job, [])

    # --- writing ---------------------------------------------------------------------------------

    def _step(self) -> None:
        """A token for every text."""
        started = time.perf_counter()
        n = len(self._writing)
        alternatives = self._alternatives()
        record = self._sampler.draw(self._logits).tolist()
        told: dict[Job, list[Written]] = {}
        ended, failed = [], {}
        for row, (writing, figures) in enumerate(zip(self._writing, record, strict=True)):
            token, log_prob, entropy = figures
            text = writing.choice.row
            if token < 0:
                failed[writing.job] = NonFiniteOutput(len(text.drawn) + 1)
                continue
            drawn = Drawn(int(token), log_prob, entropy)
            piece = text.take(drawn)
            told.setdefault(writing.job, []).append(
                Written(writing.number, piece, drawn, alternatives.get(row, []), text.reason)
            )
            if text.reason is not None:
                ended.append((row, drawn.token))
        for row, token in reversed(ended):
            self._has_written(row, token)
        for job, error in failed.items():
            self._log(str(error))
            told.pop(job, None)
            self._fail(job, error)
        if self._writing:
            tokens = [writing.choice.row.drawn[-1].token for writing in self._writing]
            tokens = torch.tensor(tokens, device=self.decoder.device)
            self._logits = self._batch.decode(tokens)
        self._step_seconds = time.perf_counter() - started
        self.figures.update(written=n, steps=1, rows=n, seconds=self._step_seconds)
        for job, written in told.items():
            job.done = all(choice.row.reason is not None for choice in job.choices)
            job.tell(job, written)

    def _alternatives(self) -> dict[int, Alternatives]:
        """By row, where they are asked for."""
        wanted = {
            row: writing.choice.n_alternatives
            for row, writing in enumerate(self._writing)
            if writing.choice.n_alternatives
        }
        if not wanted:
            return {}
        n = min(max(wanted.values()), self.decoder.vocab_size)
        best = self._logits[list(wanted)].log_softmax(-1).topk(n)
        tokens, values = best.indices.tolist(), best.values.tolist()
        return {
            row: list(zip(tokens[i][:n], values[i][:n], strict=True))
            for i, (row, n) in enumerate(wanted.items())
        }

    def _so_far(self, row: int) -> Known:
        """What is known of a text between two steps, when all of its tokens are read."""
        writing = self._writing[row]
        tokens = [drawn.token for drawn in writing.choice.row.drawn]
        last, n = (*writing.last, *tokens[-LAST:]), writing.n + len(tokens)
        state, logits = self._batch.state(row), self._logits[row : row + 1]
        return self.layout.pack(state, logits, n, last, self._sampler.seen(row))

    def _has_written(self, row: int, token: int) -> None:
        """Keep what is known of a text that ends with this token, and let it leave.

        The last token was drawn and not read.
        """
        writing = self._writing[row]
        job, tokens = writing.job, [drawn.token for drawn in writing.choice.row.drawn]
        ended_itself = writing.choice.row.reason == "end_of_text"
        tokens = tokens if ended_itself else tokens[:-1]
        wants_state = job.keeps and writing.number == 0
        if tokens or wants_state:
            state, logits = self._batch.state(row), self._logits[row : row + 1]
            seen, n = self._sampler.seen(row), writing.n + len(tokens)
            writing.prefix.add(tokens)
            last = (*writing.last, *tokens[-LAST:])
            # The token that is not read is among the seen ones by now; if it is by itself is known.
            known = self.layout.pack(state, logits, n, last, self._without(seen, writing, token))
            self.cache.keep(writing.prefix, known)
            if wants_state:
                idx = torch.tensor([[token]], device=self.decoder.device)
                logits, state = self.decoder.read(idx, state, last_only=True)
                last = (*last, token)
                job.known = self.layout.pack(state, logits[:, -1], n + 1, last, seen)
        self._leave(row)

    def _without(self, seen: Tensor, writing: Writing, token: int) -> Tensor:
        """What a text holds but for its last token, where that is the only one of its kind."""
        before = writing.job.known.seen_tokens(self.decoder.vocab_size)
        tokens = [drawn.token for drawn in writing.choice.row.drawn]
        read = tokens if writing.choice.row.reason == "end_of_text" else tokens[:-1]
        if bool(before[token]) or token in read:
            return seen
        less = seen.clone()
        less[token] = False
        return less

    def _leave(self, row: int) -> None:
        last = self._writing.pop()
        if row < len(self._writing):
            self._writing[row] = last
            self._logits[row] = self._logits[-1]
        self._logits = self._logits[:-1]
        self._batch.leave(row)
        self._sampler.leave(row)
