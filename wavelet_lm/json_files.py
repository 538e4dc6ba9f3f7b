"""Reading JSON that others wrote: whatever is wrong with it is one line."""

import json
from pathlib import Path
from typing import Any

from wavelet_lm.errors import UserError

# No file of ours nests more than a few levels; what handles values deeper down may recurse.
MAX_DEPTH = 64
MAX_SHOWN = 200


def read_json(path: str | Path) -> Any:
    """The value in a file, which may start with a byte order mark.

    Raises:
        UserError: it cannot be read, or is not UTF-8 or not JSON; the line names file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    return parse_json(text, str(path))


def parse_json(text: str, source: str, line: int | None = None) -> Any:
    """The value of a text; `source` says in an error where it stands, as does `line` of only one.

    Raises:
        UserError: the text is not JSON, is nested too deeply, or has a number of too many digits.
    """
    place = f"{source}: line {line}" if line else source
    try:
        value = json.loads(text)
        too_deep = _is_deeper(value, MAX_DEPTH)
    except json.JSONDecodeError as error:
        at = place if line else f"{source}: line {error.lineno}"
        raise UserError(f"{at} is not JSON ({error.msg})") from None
    except RecursionError:
        too_deep = True
    except ValueError:  # Python's limit for whole numbers
        raise UserError(f"{place} has a number of too many digits to be read") from None
    if too_deep:
        raise UserError(f"{place} has lists or objects more than {MAX_DEPTH} deep")
    return value


def said_format(header: dict[str, str]) -> str:
    """What a file's header says of its format, in words."""
    said = header.get("format")
    return "its header names no format" if said is None else f"its format is {brief(said)}"


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether containers lie in one another deeper than that; without recursion."""
    level = [value]
    for _ in range(depth + 1):
        level = [
            item
            for node in level
            if isinstance(node, (dict, list))
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


def brief(value: Any) -> str:
    """`repr` for an error message: of what is long, the beginning."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
