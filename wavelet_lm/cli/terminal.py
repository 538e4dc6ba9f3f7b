"""Completions on their way out: text as it comes, JSON lines, how fast it was, and the record."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wavelet_lm.errors import UserError
from wavelet_lm.inference.completion import Writer
from wavelet_lm.inference.generation import NonFiniteOutput, encode_prompt, start_token
from wavelet_lm.inference.reading import Reading
from wavelet_lm.inference.rows import Completion, Request
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.inference.text.metrics import format_metrics
from wavelet_lm.inference.text.prompts import Prompt
from wavelet_lm.inference.text.record import RECORD, record


@dataclass(frozen=True)
class Output:
    """Where everything goes.

    Attributes:
        write: gets text, and nothing else; `log` gets lines about it.
        checkpoint: the file that the model came from; the record lies beside it.
        command: what was typed.
        as_json: write one JSON object per completion in place of its text.
        record: append every text to the run's `generations.txt`.
        metrics: log the figures of every text.
    """

    write: Callable[[str], object]
    log: Callable[[str], object]
    checkpoint: Path
    command: str
    as_json: bool = False
    metrics: bool = False
    record: bool = True

    def done(self, prompt: str, completion: Completion) -> None:
        """What is due for every completion, besides its text."""
        if self.as_json:
            self.write(json_line(prompt, completion))
        if self.metrics:
            self.log(format_metrics(completion.metrics))

    def keep(self, prompt: str, completion: Completion, sampling: SamplingOptions) -> None:
        """Record a completion, before it is written: output may fail, and nothing should be lost.

        A record that cannot be written is a line for the log, since the text is what counts.
        """
        if not self.record:
            return
        try:
            record(self.checkpoint.parent / RECORD, self.command, prompt, completion, sampling)
        except (OSError, UserError) as error:
            self.log(f"not recorded: {error}")

    @contextmanager
    def naming_the_checkpoint(self) -> Iterator[None]:
        """Output of the model that is not finite is the fault of its file."""
        try:
            yield
        except NonFiniteOutput as error:
            if not self.as_json:
                self.write("\n")
            raise UserError(f"{self.checkpoint}: {error}") from None


def read_prompt(
    writer: Writer, prompt: str, before: Reading | None, log: Callable[[str], object]
) -> Reading:
    """Read a prompt, or go on with it after a text that was read."""
    if prompt:
        return writer.read([encode_prompt(writer.tokenizer, prompt)], before)
    if before is not None:
        return before
    log(f"empty prompt: starting from {start_token(writer.tokenizer)[1]}")
    return writer.read([encode_prompt(writer.tokenizer, "")])


def write_samples(
    writer: Writer,
    reading: Reading,
    prompt: str,
    requests: Sequence[Request],
    output: Output,
    *,
    batch_size: int,
    echo: bool = True,
) -> None:
    """Write the samples of one prompt, `batch_size` of them at once.

    The first one is written as it comes, the others when they are done, in order. Of several each
    has a heading. Requests for 0 tokens write nothing; what the prompt took is logged.

    Args:
        reading: of the prompt.
        prompt: its text, which is written before every sample if `echo`.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the texts so far are written and recorded.
        UserError: output that is not finite, or, before anything is written, texts that would be
            longer than the model can read.
    """
    if not any(request.num_tokens for request in requests):
        output.log(f"prompt: {_rate(reading.n_tokens, reading.seconds)}")
        return
    writer.check_lengths(reading.lengths[:1] * len(requests), requests)
    n, shown_prompt = len(requests), prompt if echo else ""

    def begin(i: int) -> None:
        if not output.as_json:
            heading = f"=== sample {i + 1} of {n}, seed {requests[i].seed} ===\n" if n > 1 else ""
            output.write(heading + shown_prompt)

    def show(row: int, piece: str) -> None:
        if row == 0 and first == 0 and not output.as_json:
            output.write(piece)

    for first in range(0, n, batch_size):
        group = requests[first : first + batch_size]
        rows = writer.fork(reading, [0] * len(group))
        if first == 0:
            begin(0)
        with output.naming_the_checkpoint():
            completions = writer.write(rows, group, show)
        for completion in completions:
            output.keep(prompt, completion, writer.strategy.sampling)
        for i, completion in enumerate(completions, first):
            if i > 0:
                begin(i)
            if not output.as_json:
                output.write((completion.text if i > 0 else "") + "\n")
            output.done(prompt, completion)
        output.log(speed(reading if first == 0 else None, completions))
        stop_if_interrupted(completions, group)


def write_batch(
    writer: Writer,
    jobs: Sequence[tuple[Prompt, Request]],
    output: Output,
    *,
    batch_size: int,
    before: Reading | None = None,
) -> None:
    """Continue many prompts, `batch_size` of them at once, and write them out in order.

    Args:
        before: a text that all of them follow.

    Raises:
        KeyboardInterrupt, UserError: as `write_samples`; a prompt that cannot be encoded is found
            before anything is written.
    """
    encoded = []
    for number, (prompt, _) in enumerate(jobs, 1):
        if not prompt.text and before is not None:
            raise UserError(f"prompt {number} is empty; after a loaded state each needs some text")
        if not prompt.text:
            start = start_token(writer.tokenizer)[1]
            output.log(f"prompt {number} is empty: starting from {start}")
        try:
            encoded.append(encode_prompt(writer.tokenizer, prompt.text))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None
    for first in range(0, len(jobs), batch_size):
        rows = slice(first, first + batch_size)
        group = jobs[rows]
        start = None if before is None else writer.fork(before, [0] * len(group))
        reading = writer.read(encoded[rows], start)
        with output.naming_the_checkpoint():
            completions = writer.write(reading, [request for _, request in group])
        for (prompt, _), completion in zip(group, completions, strict=False):
            output.keep(prompt.text, completion, writer.strategy.sampling)
        for (prompt, _), completion in zip(group, completions, strict=False):
            output.done(prompt.text, completion)
        output.log(speed(reading, completions))
        stop_if_interrupted(completions, group)


def stop_if_interrupted(completions: Sequence[Completion], asked: Sequence[Any]) -> None:
    """Raise KeyboardInterrupt where Ctrl-C cut the texts short, or kept some from being begun."""
    if len(completions) < len(asked) or any(c.reason == "interrupted" for c in completions):
        raise KeyboardInterrupt


def speed(reading: Reading | None, completions: Sequence[Completion]) -> str:
    """Tokens per second of reading, and of writing after the first two tokens, as one line.

    The second token is the first one that needs a step, which a compiler may have to make first.
    """
    read = f"prompt: {_rate(reading.n_tokens, reading.seconds)}; " if reading is not None else ""
    n = sum(max(len(c.tokens) - 2, 0) for c in completions)
    seconds = max((c.timings.decode_seconds for c in completions), default=0)
    texts = f" in {len(completions)} texts" if len(completions) > 1 else ""
    accepted = sum(c.counts.accepted for c in completions if c.counts)
    proposed = sum(c.counts.proposed for c in completions if c.counts)
    drafted = f"; {accepted} of {proposed} drafted tokens kept" if proposed else ""
    return f"{read}generated: {_rate(n, seconds)} after the first two{texts}{drafted}"


def _rate(n: int, seconds: float) -> str:
    if n < 1 or seconds <= 0:
        return f"{n} tokens"
    return f"{n} tokens in {seconds:.2f} s, {n / seconds:,.1f} tokens/s"


def json_line(prompt: str, completion: Completion) -> str:
    """A completion as one line of JSON; times in seconds."""
    c = completion
    timings: dict[str, Any] = c.timings._asdict()
    if c.counts is not None:
        timings |= {"proposed": c.counts.proposed, "accepted": c.counts.accepted}
    values = {
        "prompt": prompt,
        "text": c.text,
        "tokens": c.tokens,
        "seed": c.seed,
        "reason": c.reason,
        "metrics": c.metrics,
        "timings": timings,
    }
    return json.dumps(values) + "\n"
