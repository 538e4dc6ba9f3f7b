"""Prompts from files and from standard input."""

from __future__ import annotations

import os
import select
import stat
import sys
from dataclasses import dataclass
from typing import Any

from wavelet_lm.errors import UserError
from wavelet_lm.inference.checks import MAX_SEED
from wavelet_lm.json_files import brief, parse_json
from wavelet_lm.text_files import STANDARD_INPUT, read_text

# Seconds that a pipe may be silent before it is said that it is waited for.
PATIENCE = 2


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and how, where it differs from the command's own options (None)."""

    text: str
    seed: int | None = None
    num_tokens: int | None = None
    stop: tuple[str, ...] | None = None


def read_piped() -> str:
    """What a pipe or a file gives on standard input, empty where nothing is piped in.

    A terminal, a device such as /dev/null and a closed standard input give nothing. A pipe is read
    to its end, with a line on standard error where nothing comes, and its last line break is not
    part of the text, which goes on with that line.

    Raises:
        UserError: as `read_text`.
    """
    try:
        descriptor = sys.stdin.fileno()
        mode = os.fstat(descriptor).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or no file at all
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
        return ""
    if not select.select([descriptor], [], [], PATIENCE)[0]:
        print("reading the prompt from standard input, up to its end", file=sys.stderr)
    return read_text(STANDARD_INPUT).removesuffix("\n")


def read_prompts(path: str) -> list[Prompt]:
    """One prompt per line: the line itself, or for a `.jsonl` file the object in it.

    An object has a `prompt` and, if you like, `seed`, `num_tokens` and `stop` (one text or a list).
    Empty lines are empty prompts, and are skipped in a `.jsonl` file.

    Raises:
        UserError: as `read_text`, or a line that is no such object, or no line at all.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    if lines[-1] == "":  # what follows the last line's end
        lines.pop()
    if path.lower().endswith(".jsonl"):
        prompts = [_prompt_of(line, path, i) for i, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [Prompt(line) for line in lines]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; give one a line")
    return prompts


def _prompt_of(line: str, path: str, number: int) -> Prompt:
    where = f"{path}: line {number}"
    given = parse_json(line, path, number)
    if not isinstance(given, dict) or "prompt" not in given:
        raise UserError(f'{where} must be an object with a "prompt"')
    for key, value in given.items():
        if key not in ALLOWED:
            raise UserError(
                f"{where} has an unknown key {brief(key)}; known are {', '.join(ALLOWED)}"
            )
        is_allowed, words = ALLOWED[key]
        if not is_allowed(value):
            raise UserError(f"{where}: {key} is {brief(value)}; it must be {words}")
    stop = given.get("stop")
    if stop is not None:
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
    return Prompt(given["prompt"], given.get("seed"), given.get("num_tokens"), stop)


def _is_number(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_stop(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) and item != "" for item in items)


ALLOWED = {
    "prompt": (lambda value: isinstance(value, str), "a text"),
    "seed": (lambda value: _is_number(value, 0, MAX_SEED), f"between 0 and {MAX_SEED}"),
    "num_tokens": (lambda value: _is_number(value, 1, sys.maxsize), "1 or more"),
    "stop": (_is_stop, "a text or a list of texts, none of them empty"),
}
