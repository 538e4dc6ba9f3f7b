"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

from wavelet_lm.config.option import option
from wavelet_lm.errors import UserError
from wavelet_lm.inference.checks import check_fields

UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6}
UNITS |= {"gb": 10**9}
MiB = 2**20


@dataclass(frozen=True)
class ServeOptions:
    """The limits of a server, and what it tells of requests.

    Raises:
        UserError: a value out of range.
    """

    max_streams: int = option(256, "texts at once; more are refused with 503", minimum=1)
    max_prompt: int = option(262144, "most tokens of a prompt", minimum=1)
    max_tokens: int = option(4096, "most tokens of an answer", minimum=1)
    max_body: int = option(4 * MiB, "most bytes of a request", minimum=1024)
    max_states: int = option(4096, "most saved states", minimum=0)
    state_cache: int = option(
        256 * MiB, "bytes of states of prompts and answers that are kept; 0: none", minimum=0
    )
    timeout: float = option(600.0, "seconds until a text is ended", above=0, maximum=86400.0)
    log_requests: bool = option(False, "a line for every request, without its text")
    log_prompts: bool = option(False, "the prompts as well")

    def __post_init__(self) -> None:
        check_fields(self)


def parse_bytes(text: str) -> int:
    """A number of bytes as it is typed: `256MiB`, `4GB`, `65536`.

    Raises:
        UserError: it is none.
    """
    digits = text.rstrip("BKMGibkmg")
    unit = text[len(digits) :].lower()
    try:
        number = float(digits) * UNITS[unit]
        return int(number)
    except (KeyError, ValueError, OverflowError):
        raise UserError(
            f"{text!r} is no number of bytes; write it like 256MiB, 4GB or 65536"
        ) from None
