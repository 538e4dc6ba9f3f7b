"""A sample written to the terminal as it comes, how fast it came, and the run's record of it."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from wavelet_lm.errors import UserError
from wavelet_lm.files import append_line
from wavelet_lm.inference.generation import (
    NonFiniteOutput,
    TextStream,
    check_vocabulary,
    encode_prompt,
    start_token,
    stream_tokens,
)
from wavelet_lm.inference.sampling import SamplingOptions

if TYPE_CHECKING:
    from wavelet_lm.data.tokenizers import Tokenizer

RECORD = "generations.txt"


@dataclass
class Sample:
    """A generated text (without its prompt), its tokens, and the seconds that they took.

    `prompt_seconds` runs from the call to the first token; `decode_seconds` from there to the last.
    """

    text: str = ""
    n_prompt_tokens: int = 0
    n_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    interrupted: bool = False

    def speed(self) -> str:
        """Tokens per second of the prompt and of decoding alone, as one line."""
        return (
            f"prompt: {_rate(self.n_prompt_tokens, self.prompt_seconds)};"
            f" generated: {_rate(self.n_tokens - 1, self.decode_seconds)} after the first"
        )


def write_sample(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    options: SamplingOptions,
    seed: int,
    ignore_eot: bool,
    write: Callable[[str], object],
) -> Sample:
    """Generate like `generate`; `write` gets the prompt, then each piece of text when it is there.

    Ctrl-C ends the sample, which then says so, instead of raising.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    write(prompt)
    stop = None if ignore_eot else tokenizer.end_of_text
    sample = Sample(n_prompt_tokens=len(prompt_ids))
    text = TextStream(tokenizer)

    def put(piece: str) -> None:
        sample.text += piece
        write(piece)

    started = first = time.perf_counter()
    with _ctrl_c_as_flag() as pressed:
        for token in stream_tokens(model, prompt_ids, num_tokens, options, seed, stop):
            now = time.perf_counter()
            if sample.n_tokens == 0:
                first = now
                sample.prompt_seconds = first - started
            sample.n_tokens += 1
            sample.decode_seconds = now - first
            put(text.feed(token))
            if pressed:
                sample.interrupted = True
                break
    put(text.finish())
    return sample


@contextmanager
def _ctrl_c_as_flag() -> Iterator[list[int]]:
    """A list that Ctrl-C makes non-empty, so that no token is cut in two; a second one raises."""
    pressed: list[int] = []

    def note(signum: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def write_samples(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    options: SamplingOptions,
    *,
    seed: int,
    n: int,
    ignore_eot: bool,
    checkpoint: Path,
    write: Callable[[str], object],
    log: Callable[[str], object],
) -> None:
    """Write `n` samples (seeds `seed`, `seed` + 1, …), their speeds to `log`, and record them.

    They are recorded in `generations.txt` beside `checkpoint`.

    Raises:
        KeyboardInterrupt: after a sample that Ctrl-C ended, once its speed and record are written.
        UserError: counts below 1, a prompt that cannot be encoded, output that is not finite.
    """
    for name, count in (("num_tokens", num_tokens), ("n", n)):
        if count < 1:
            raise UserError(f"{name} is {count}; it must be 1 or more")
    check_vocabulary(model, tokenizer)
    if not prompt:
        log(f"empty prompt: starting from {start_token(tokenizer)[1]}")
    for i in range(n):
        if n > 1:
            write(f"=== sample {i + 1} of {n}, seed {seed + i} ===\n")
        try:
            sample = write_sample(
                model, tokenizer, prompt, num_tokens, options, seed + i, ignore_eot, write
            )
        except NonFiniteOutput as error:
            write("\n")
            raise UserError(f"{checkpoint}: {error}") from None
        write("\n")
        log(sample.speed())
        details = {"seed": seed + i, "num_tokens": num_tokens, "checkpoint": str(checkpoint)}
        try:
            record_sample(checkpoint.parent / RECORD, prompt, sample, options, **details)
        except (OSError, UserError) as error:  # the text is on the screen, which is what counts
            log(f"not recorded: {error}")
        if sample.interrupted:
            raise KeyboardInterrupt


def record_sample(
    path: Path, prompt: str, sample: Sample, options: SamplingOptions, **details: object
) -> None:
    """Append a sample to a run's `generations.txt`: date, options and `details`, prompt, text.

    It is one write, so that the entries of two processes do not mix.
    """
    settings = {**dataclasses.asdict(options), **details, "tokens": sample.n_tokens}
    entry = (
        f"=== {datetime.now().astimezone().isoformat(timespec='seconds')} {json.dumps(settings)}\n"
        f"--- prompt\n{prompt}\n--- text\n{sample.text}\n"
    )
    append_line(path, entry)


def _rate(n: int, seconds: float) -> str:
    if n < 1 or seconds <= 0:
        return f"{max(n, 0)} tokens"
    return f"{n} tokens in {seconds:.2f} s, {n / seconds:,.1f} tokens/s"
