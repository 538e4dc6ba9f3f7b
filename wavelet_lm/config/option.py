"""One option: its type, default, range and meaning, declared once as a field of a dataclass.

JSON files, command-line flags, `--help`, error messages and the reference page all come from the
declaration.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from wavelet_lm.errors import UserError
from wavelet_lm.json_files import brief


class ConfigError(UserError):
    """A key that is unknown, of the wrong type, out of range, or at odds with another key."""


@dataclass(frozen=True)
class Option:
    """What is known of one key besides its name, type and default.

    cost: the parameters that come with it, in the symbols of `config_reference.py`; for a switch
    those of its being on, for a number those of its value; empty = none.
    word: a text that is allowed in place of a number.
    """

    meaning: str
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    choices: tuple[Any, ...] | None = None
    cost: str = ""
    word: str | None = None

    def range(self) -> str:
        """The allowed values in words, empty when every value of the type is allowed."""
        if self.choices is not None:
            return " | ".join(show(choice) for choice in self.choices)
        bounds = [("> ", self.above), (">= ", self.minimum), ("<= ", self.maximum)]
        words = " and ".join(f"{sign}{show(bound)}" for sign, bound in bounds if bound is not None)
        return words if self.word is None else f"{self.word} or {words}"

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type is in range."""
        if self.choices is not None:
            # `True in (1,)` holds in Python; a choice must also agree in type.
            return any(value == c and type(value) is type(c) for c in self.choices)
        if isinstance(value, str) and self.word is not None:
            return value == self.word
        return (
            (self.above is None or value > self.above)
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
        )


def option(default: Any, meaning: str, **limits: Any) -> Any:
    """A field of a config with its `Option`, whose limits are `limits`."""
    return field(default=default, metadata={"option": Option(meaning, **limits)})


def option_of(owner: type, name: str, default: Any) -> Any:
    """A field for the option that the dataclass `owner` declares, with a default of its own."""
    return field(default=default, metadata=owner.__dataclass_fields__[name].metadata)


# --- values ---------------------------------------------------------------------------------------


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return ",".join(show(item) for item in value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    return str(value) if value != "" else '""'


def type_words(spec: dataclasses.Field) -> str:
    """The type of a key as people say it."""
    return {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "bool | str": "auto, true or false",
        "bool | int": "true, false or a whole number",
        "int | str": "auto or a whole number",
        "str": "a text",
        "str | None": "a text or none",
        "int | None": "a whole number or none",
        "float | None": "a number or none",
        "tuple[float, ...]": "a list of numbers",
        "tuple[float, ...] | None": "a list of numbers or none",
        "tuple[str, ...]": "a list of texts",
    }[spec.type]


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _converted(spec: dataclasses.Field, value: Any) -> Any:
    """`value` in the field's Python type; raises ValueError where it does not fit."""
    kind = spec.type
    if value is None and kind.endswith("| None"):
        return None
    if kind == "int | str" and value == spec.metadata["option"].word:
        return value
    if kind == "bool | int" and isinstance(value, bool):
        return value
    if kind.startswith("int") or kind == "bool | int":
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError
        return value
    if kind.startswith("float"):
        if not _is_number(value):
            raise ValueError
        return float(value)
    if kind.startswith("tuple"):
        is_item = _is_number if "float" in kind else lambda item: isinstance(item, str)
        if not isinstance(value, (list, tuple)) or not value or not all(map(is_item, value)):
            raise ValueError
        return tuple(float(item) if "float" in kind else item for item in value)
    allowed = {"bool": bool, "bool | str": (bool, str)}.get(kind, str)
    if not isinstance(value, allowed):
        raise ValueError
    return value


def checked(spec: dataclasses.Field, value: Any) -> Any:
    """The converted value within its range, or a `ConfigError` that says what is allowed."""
    limits: Option = spec.metadata["option"]
    try:
        value = _converted(spec, value)
    except ValueError:
        raise ConfigError(f"{spec.name} is {brief(value)}; it must be {type_words(spec)}") from None
    items = value if isinstance(value, tuple) else (value,)
    if value is not None and not all(limits.allows(item) for item in items):
        raise ConfigError(f"{spec.name} is {show(value)}; it must be {limits.range()}")
    return value


def parsed(spec: dataclasses.Field, text: str) -> Any:
    """A value from its command-line form (`none`, `true`, `1,1,.5`, `0.02`, …)."""
    kind = spec.type
    word = text.strip().lower()
    try:
        if word == "none" and kind.endswith("| None"):
            return None
        if kind == "bool | int" and word not in ("true", "false"):
            return int(text)
        if kind.startswith("bool"):
            return {"true": True, "1": True, "false": False, "0": False, "auto": "auto"}[word]
        if kind == "int | str" and word == spec.metadata["option"].word:
            return word
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
        if kind.startswith("tuple"):
            items = text.strip("[]() ").split(",")
            return tuple(float(item) if "float" in kind else item.strip() for item in items)
    except (ValueError, KeyError):
        raise ConfigError(f"--{spec.name} is {text!r}; it must be {type_words(spec)}") from None
    return text


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint with the most similar known key, or nothing when none is similar."""
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
