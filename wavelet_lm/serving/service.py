"""A model that is served: requests become jobs, and what is written comes back to them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wavelet_lm.config import Config
from wavelet_lm.data.tokenizer_base import Tokenizer
from wavelet_lm.errors import UserError
from wavelet_lm.inference.completion import LINE_TOKENS
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import NonFiniteOutput, encode_prompt
from wavelet_lm.inference.rows import Request, Row
from wavelet_lm.inference.state_file import ModelRecord
from wavelet_lm.serving.fields import Asked
from wavelet_lm.serving.inbox import Inbox, Mailroom
from wavelet_lm.serving.job import Choice, Job, Written
from wavelet_lm.serving.known import Known
from wavelet_lm.serving.options import ServeOptions
from wavelet_lm.serving.refused import Refused
from wavelet_lm.serving.saved_states import SavedStates, Summary
from wavelet_lm.serving.scheduler import Scheduler
from wavelet_lm.serving.state_cache import StateCache

# Characters of a prompt from which it is encoded beside the event loop.
LONG_PROMPT = 16384
# Seconds that a refused client is told to wait.
RETRY_AFTER = 2
# Seconds that the speed is a mean over.
SPEED_SECONDS = 10.0


@dataclass
class Work:
    """What a request has in the scheduler.

    Attributes:
        jobs: one for each prompt; prompts: their tokens, without those of a saved state.
        written: for each text of each job all that was written.
        open_jobs: of which more will be told.
    """

    jobs: list[Job]
    prompts: list[list[int]]
    n_before: int
    inbox: Inbox = field(default_factory=Inbox)
    written: list[list[list[Written]]] = field(default_factory=list)
    open_jobs: set[Job] = field(init=False)

    def __post_init__(self) -> None:
        self.open_jobs = set(self.jobs)

    async def updates(
        self, pace: Callable[[], float] = lambda: 0.0
    ) -> AsyncIterator[tuple[int, list[Written]]]:
        """What is written, as the number of the job and what it wrote, until all is.

        pace: seconds between what is told at once and what is told next, but for a job's end.

        Raises:
            Refused: a job failed.
        """
        while self.open_jobs:
            news: dict[int, list[Written]] = {}
            for job, written, done in await self.inbox.take():
                if done:  # as of this letter: the job itself may be further on
                    self.open_jobs.discard(job)
                if job.error is not None:
                    raise _failure(job.error)
                number = self.jobs.index(job)
                news.setdefault(number, []).extend(written)
                for one in written:
                    self.written[number][one.choice].append(one)
            for number, written in news.items():
                yield number, written
            if self.open_jobs:
                await self.inbox.rest(pace())

    def known(self) -> Known:
        """What is known of the one text.

        Raises:
            Refused: time, or the server, came to an end before it was read.
        """
        if self.jobs[0].known is None:
            raise Refused(503, "the text was not read to its end", retry_after=RETRY_AFTER)
        return self.jobs[0].known

    @property
    def n_prompt(self) -> int:
        """Tokens of all prompts, with those that a saved state has read."""
        return sum(self.n_before + len(tokens) for tokens in self.prompts)

    @property
    def n_cached(self) -> int:
        """Those of them that were not read again."""
        return sum(self.n_before + job.n_cached for job in self.jobs)

    @property
    def n_written(self) -> int:
        """Tokens of all texts so far."""
        texts = [text for texts in self.written for text in texts]
        return sum(one.drawn is not None for text in texts for one in text)


class Service:
    """Everything behind the HTTP interface; its methods run on one event loop.

    Args:
        decoder: of the model, whose fast weights rest.
        model: what is known of the model itself.
        tokenizer: the model's.
        name: of the model, as it is served.
        folder: of saved states; None: they last as long as the server.
        log: gets lines.

    Attributes:
        scheduler, states, tokenizer, config, limits, name: as they say.
        n_streams: texts that are waited for, being read or written.
    """

    def __init__(
        self,
        decoder: Decoder,
        model: ModelRecord,
        tokenizer: Tokenizer,
        limits: ServeOptions,
        name: str,
        folder: Path | None = None,
        log: Callable[[str], object] = lambda line: None,
    ):
        self.decoder, self.tokenizer, self.limits, self.name = decoder, tokenizer, limits, name
        self.model: ModelRecord = model
        self.config: Config = model.config
        self.scheduler = Scheduler(decoder, StateCache(limits.state_cache), log)
        layout = self.scheduler.layout
        self.states = SavedStates(decoder, layout, model, folder, limits.max_states)
        self.n_streams, self.log = 0, log
        self._jobs: set[Job] = set()
        self._mail: Mailroom | None = None
        self._stopping = False
        self._speeds: deque[tuple[float, int]] = deque()

    def start(self) -> None:
        """Begin, on the event loop that is running."""
        self._mail = Mailroom(asyncio.get_running_loop())
        self.scheduler.start()

    def stop(self) -> None:
        """Refuse what comes, and end what is being written: its reason is `shutdown`."""
        self._stopping = True
        for job in self._jobs:
            self.scheduler.end(job, "shutdown")

    def close(self) -> None:
        """Wait for the scheduler."""
        self._stopping = True
        self.scheduler.close()

    @property
    def stopping(self) -> bool:
        """Whether the server is about to end."""
        return self._stopping

    def speed(self) -> float:
        """Tokens per second that were written lately."""
        now, written = time.monotonic(), self.scheduler.figures["written"]
        self._speeds.append((now, written))
        while now - self._speeds[0][0] > SPEED_SECONDS and len(self._speeds) > 2:
            self._speeds.popleft()
        then, before = self._speeds[0]
        return (written - before) / (now - then) if now > then else 0.0

    # --- work ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def writing(
        self, asked: Asked, texts: Sequence[str | list[int]], stop: Sequence[str] = ()
    ) -> AsyncIterator[Work]:
        """The work of a request, begun; when it is left, whatever is not done is ended.

        Args:
            texts: the prompts.
            stop: texts that end an answer beside those that are asked for.

        Raises:
            Refused: a prompt that cannot be, or a server that is full or about to end.
        """
        start = await self.state(asked.state)
        self._check_room(len(texts) * asked.best_of)  # before anything is encoded
        prompts = [await self.tokens(text, start) for text in texts]
        if asked.save_as is not None:
            self.states.check_room(asked.save_as)
        n_before = 0 if start is None else start.n
        jobs = []
        for i, tokens in enumerate(prompts):
            seeds = range(asked.seed + i * asked.best_of, asked.seed + (i + 1) * asked.best_of)
            keeps = asked.save_as is not None
            n = self._n_tokens(asked.max_tokens, n_before + len(tokens), last_is_read=keeps)
            after = self._line_before(asked, tokens, start)
            rows = [
                self._row(asked, Request(seed, n, (*asked.stop, *stop)), after) for seed in seeds
            ]
            options = asked.strategy.sampling
            choices = [
                Choice(row, seed, options, asked.alternatives or 0)
                for row, seed in zip(rows, seeds, strict=True)
            ]
            jobs.append(Job(tokens, choices, start, keeps))
        work = Work(jobs, prompts, n_before)
        work.written = [[[] for _ in job.choices] for job in jobs]
        async with self._in_progress(work):
            yield work

    async def read(self, tokens: list[int], start: Known | None) -> Known:
        """Read a text, and give what is known of it.

        Raises:
            Refused: as `writing`.
        """
        n = (0 if start is None else start.n) + len(tokens)
        self._n_tokens(1, n)
        work = Work([Job(tokens, [], start)], [tokens], 0, written=[[]])
        async with self._in_progress(work):
            async for _ in work.updates():
                pass
        return work.known()

    @asynccontextmanager
    async def _in_progress(self, work: Work) -> AsyncIterator[None]:
        n_streams = sum(max(1, len(job.choices)) for job in work.jobs)
        self._check_room(n_streams)  # others have come while a long prompt was encoded
        self.n_streams += n_streams
        loop = asyncio.get_running_loop()
        timers = []
        for job in work.jobs:
            job.tell = lambda job, written: self._mail.send(
                work.inbox, (job, written, job.done), urgent=job.done
            )
            self._jobs.add(job)
            self.scheduler.submit(job)
            timers.append(loop.call_later(self.limits.timeout, self.scheduler.end, job, "timeout"))
        try:
            yield
        finally:
            for timer, job in zip(timers, work.jobs, strict=True):
                timer.cancel()
                self._jobs.discard(job)
                if not job.done:
                    self.scheduler.end(job, "left")
                job.tell = Job.tell  # a circle of objects would keep the job's states in memory
            self.n_streams -= n_streams

    def _check_room(self, n: int) -> None:
        if self._stopping:
            raise Refused(503, "the server is about to end", retry_after=RETRY_AFTER)
        if self.n_streams + n > self.limits.max_streams:
            raise Refused(
                503,
                f"the server is full: {self.n_streams} of {self.limits.max_streams} texts are being"
                " written",
                retry_after=RETRY_AFTER,
            )

    def summary(self, name: str, known: Known | None = None) -> dict[str, Any]:
        """What is said of a saved state; with the end of its text where that is at hand.

        Raises:
            Refused: there is none of this name.
        """
        said = self.said(name, self.states.summary(name))
        if known is not None:
            said["tail"] = self.tokenizer.decode(known.last)
        return said

    def said(self, name: str, found: Summary) -> dict[str, Any]:
        """The same, of a state that was found."""
        n_bytes = self.scheduler.layout.n_bytes
        return {
            "id": name,
            "object": "state",
            "created": found.created,
            "tokens": found.n,
            "bytes": n_bytes,
        }

    # --- prompts ---------------------------------------------------------------------------------

    async def state(self, name: str | None) -> Known | None:
        """A saved state by its name.

        Raises:
            Refused: there is none, or its file is damaged.
        """
        if name is None:
            return None
        try:
            return await asyncio.to_thread(self.states.get, name)
        except UserError as error:
            raise Refused(409, str(error), "state") from None

    async def tokens(self, text: str | list[int], start: Known | None) -> list[int]:
        """The tokens of a prompt; none for an empty one after a state.

        Raises:
            Refused: it cannot be encoded, or is too long.
        """
        if isinstance(text, str):
            if not text and start is not None:
                return []
            if len(text) > LONG_PROMPT:
                tokens = await asyncio.to_thread(self._encode, text)
            else:
                tokens = self._encode(text)
        else:
            tokens = text or ([] if start is not None else self._encode(""))
            V = self.decoder.vocab_size
            if not all(0 <= token < V for token in tokens):
                raise Refused(400, f"prompt has a token that is none of 0 … {V - 1}", "prompt")
        if len(tokens) > self.limits.max_prompt:
            raise Refused(
                400,
                f"the prompt has {len(tokens):,} tokens; this server reads up to"
                f" {self.limits.max_prompt:,}",
                "prompt",
            )
        return tokens

    def _encode(self, text: str) -> list[int]:
        try:
            return encode_prompt(self.tokenizer, text)
        except UserError as error:
            raise Refused(400, str(error), "prompt") from None

    def _n_tokens(self, asked: int | None, n_read: int, last_is_read: bool = False) -> int:
        """How many tokens are written after so many; fewer than asked for are an error.

        last_is_read: the state after an answer, which is wanted, has read its last token too.

        Raises:
            Refused: the model cannot read that many.
        """
        longest = self.decoder.longest
        n = min(self.config.num_new_tokens, self.limits.max_tokens) if asked is None else asked
        room = n if longest is None else longest - n_read + (not last_is_read)
        if n <= room:
            return n
        if asked is None and room > 0:
            return room
        raise Refused(
            400,
            f"the prompt's {n_read:,} tokens and {n:,} more are too many for this model, which"
            f" reads {longest:,}",
            "prompt",
        )

    def _line_before(self, asked: Asked, tokens: list[int], start: Known | None) -> str | None:
        """Where text is cleaned, the beginning of the line that it goes on with."""
        if not asked.strategy.clean_spacing:
            return None
        last = [*(() if start is None else start.last), *tokens][-LINE_TOKENS:]
        return self.tokenizer.decode(last).rpartition("\n")[2]

    def _row(self, asked: Asked, request: Request, after: str | None) -> Row:
        end = None if asked.strategy.ignore_eot else self.tokenizer.end_of_text
        return Row(request, self.tokenizer, end, after)


def _failure(error: Exception) -> Refused:
    """What is told of a job that failed: of the model's fault the line, of ours that it is one."""
    if isinstance(error, (NonFiniteOutput, UserError)):
        return Refused(500, str(error))
    return Refused(500, "the server failed at this; its log says how")
