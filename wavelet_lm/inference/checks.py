"""What a value must be, whoever gives it: a command line, a file of prompts, a Python call."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

from wavelet_lm.config import Option
from wavelet_lm.errors import UserError
from wavelet_lm.json_files import brief

MAX_SEED = 2**63 - 1


def check_fields(options: Any, name: str = "{}") -> None:
    """Raise `UserError` where a field of a dataclass is not what its `Option` allows.

    name: how a message calls a field, {} standing for its own name.
    """
    for spec in dataclasses.fields(options):
        if "option" in spec.metadata:
            value, limits = getattr(options, spec.name), spec.metadata["option"]
            if value is not None or not spec.type.endswith("| None"):
                _check(name.format(spec.name), value, spec.type, limits)


def _check(name: str, value: Any, kind: str, limits: Option) -> None:
    """Raise `UserError` for a number out of range, or what is none of the choices."""
    kind = kind.removesuffix(" | None")
    if limits.choices is not None:
        if not limits.allows(value):
            allowed = ", ".join(limits.choices[:-1]) + f" or {limits.choices[-1]}"
            raise UserError(f"{name} is {value!r}; it must be {allowed}")
    elif kind in ("int", "float"):
        (check_integral if kind == "int" else check_number)(name, value)
        if not limits.allows(value):
            raise UserError(f"{name} is {value}; it must be {_range(limits)}")


def _range(limits: Option) -> str:
    """The numbers that an option may be, in words."""
    low, high, above = (_number(x) for x in (limits.minimum, limits.maximum, limits.above))
    if above is not None:
        return f"above {above}" + ("" if high is None else f" and at most {high}")
    return f"{low} or more" if high is None else f"between {low} and {high}"


def _number(bound: float | None) -> str | None:
    return f"{bound:g}" if isinstance(bound, float) else bound if bound is None else str(bound)


def check_integral(name: str, value: Any) -> None:
    """Raise `UserError` where this is no whole number."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UserError(f"{name} is {brief(value)}; it must be a whole number")


def check_whole(name: str, value: Any, lowest: int) -> None:
    """Raise `UserError` where this is no whole number of `lowest` or more."""
    check_integral(name, value)
    if value < lowest:
        raise UserError(f"{name} is {value}; it must be {lowest} or more")


def check_number(name: str, value: Any) -> None:
    """Raise `UserError` where this is no number; NaN is none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or value != value:
        raise UserError(f"{name} is {brief(value)}; it must be a number")


def check_seed(seed: Any) -> int:
    """The seed, if it is one that every generator takes."""
    check_integral("seed", seed)
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}; it must be between 0 and {MAX_SEED}")
    return int(seed)


def check_stop(stop: Any) -> None:
    """Raise `UserError` where these are no texts to stop at."""
    if not isinstance(stop, tuple) or not all(isinstance(text, str) for text in stop):
        raise UserError(f"stop is {brief(stop)}; it must be texts")
    if "" in stop:
        raise UserError("stop is empty, which every text holds; give some text or leave it out")
