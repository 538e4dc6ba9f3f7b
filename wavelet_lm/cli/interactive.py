"""A conversation: line after line is read and continued, and all that was said stays known."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator

from wavelet_lm.cli.terminal import Output, speed
from wavelet_lm.errors import UserError
from wavelet_lm.inference.completion import Writer
from wavelet_lm.inference.generation import encode_prompt
from wavelet_lm.inference.reading import Reading
from wavelet_lm.inference.rows import Request

PROMPT_LINE = "> "


def converse(
    writer: Writer,
    request: Request,
    output: Output,
    before: Reading | None = None,
    ask: Callable[[], str] | None = None,
    save: Callable[[Reading], object] = lambda reading: None,
) -> Reading | None:
    """Continue every line that `ask` returns, until it is empty or `ask` raises `EOFError`.

    A line follows what was said before on a line of its own, and the answer follows it at once.
    What is read teaches fast weights nothing. Ctrl-C ends an answer and keeps what there is of it;
    at the prompt line it drops the line. A line with which the models could not read on to the end
    of an answer is not read; another may be shorter.

    Args:
        request: what is asked of every answer; the n-th one is drawn with its seed + n.
        before: a text that the conversation follows.
        ask: `ask_terminal` if not given.
        save: gets what is returned, and where an exception ends the conversation what was known by
            then. A line whose answer was cut off is part of that, unless the model's output was
            not finite.

    Returns:
        All that was read and written, None for nothing.

    Raises:
        UserError: output that is not finite, a line that is not UTF-8.
    """
    reading = before
    try:
        for known in _turns(writer, request, output, before, ask or ask_terminal):
            reading = known
    finally:
        if reading is not None:
            save(reading)
    return reading


def _turns(
    writer: Writer,
    request: Request,
    output: Output,
    before: Reading | None,
    ask: Callable[[], str],
) -> Iterator[Reading | None]:
    """The conversation; yields what is known whenever that has changed."""
    reading, n = before, 0
    while True:
        asked = dataclasses.replace(request, seed=request.seed + n)
        try:
            line = ask()
            if not line:
                return
            now = writer.read([line_tokens(writer, line, reading)], reading)
            # All of the answer is read, unlike that of a text which ends there.
            whole = dataclasses.replace(asked, num_tokens=asked.num_tokens + 1)
            writer.check_lengths(now.lengths, [whole])
        except EOFError:
            return
        except KeyboardInterrupt:
            output.write("\n")
            continue
        except UserError as error:  # such as a character that the vocabulary lacks
            output.log(f"{error}; nothing was read")
            continue
        yield now
        try:
            with output.naming_the_checkpoint():
                answers = writer.write(now, [asked], lambda row, piece: output.write(piece))
        except UserError:
            yield reading
            raise
        reading, n = now, n + 1
        for answer in answers:
            output.keep(line, answer, writer.strategy.sampling)
            ended = answer.reason == "end_of_text"
            tokens = [*answer.tokens, writer.tokenizer.end_of_text] if ended else answer.tokens
            if tokens:
                reading = writer.read_written(now, tokens)
                yield reading
        output.write("\n")
        for answer in answers:
            output.done(line, answer)
            output.log(speed(now, answers))


def line_tokens(writer: Writer, line: str, before: Reading | None) -> list[int]:
    """The tokens of a line, after a line break if the text before it has not ended with one."""
    tokenizer = writer.tokenizer
    if before is None:
        return encode_prompt(tokenizer, line)
    last = before.texts[0][-1]
    if last != tokenizer.end_of_text and not tokenizer.decode([last]).endswith("\n"):
        with contextlib.suppress(UserError):  # a vocabulary of characters may have no line break
            return encode_prompt(tokenizer, "\n" + line)
    return encode_prompt(tokenizer, line)


def ask_terminal() -> str:
    """A line from the keyboard, with the lines before it in reach; or from standard input.

    Raises:
        EOFError: there is none.
        UserError: it is not UTF-8.
    """
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() then edits and remembers lines)
            return input(PROMPT_LINE)
        if sys.stdin.isatty():
            print(PROMPT_LINE, end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline().decode("utf-8")
    except OSError:  # the terminal is gone
        raise EOFError from None
    except UnicodeDecodeError as error:
        raise UserError(f"the line is not UTF-8 at byte {error.start}") from None
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
