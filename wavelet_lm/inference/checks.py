"""What a value must be, whoever gives it: a command line, a file of prompts, a Python call."""

import numbers
from typing import Any

from wavelet_lm.errors import UserError
from wavelet_lm.json_files import brief

MAX_SEED = 2**63 - 1


def check_whole(name: str, value: Any, lowest: int) -> None:
    """Raise `UserError` where this is no whole number of `lowest` or more."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UserError(f"{name} is {brief(value)}; it must be a whole number")
    if value < lowest:
        raise UserError(f"{name} is {value}; it must be {lowest} or more")


def check_number(name: str, value: Any) -> None:
    """Raise `UserError` where this is no number; NaN is none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or value != value:
        raise UserError(f"{name} is {brief(value)}; it must be a number")


def check_seed(seed: Any) -> int:
    """The seed, if it is one that every generator takes."""
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        raise UserError(f"seed is {brief(seed)}; it must be a whole number")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}; it must be between 0 and {MAX_SEED}")
    return int(seed)


def check_stop(stop: Any) -> None:
    """Raise `UserError` where these are no texts to stop at."""
    if not isinstance(stop, tuple) or not all(isinstance(text, str) for text in stop):
        raise UserError(f"stop is {brief(stop)}; it must be texts")
    if "" in stop:
        raise UserError("stop is empty, which every text holds; give some text or leave it out")
