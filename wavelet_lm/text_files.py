"""Texts that a user names: a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from wavelet_lm.errors import UserError

STANDARD_INPUT = "-"


def read_text(path: str) -> str:
    """A whole file, or standard input for `-`, exactly as it is but for a byte order mark.

    Raises:
        UserError: it cannot be read or is not UTF-8; the line names the first byte that is not.
    """
    name = "standard input" if path == STANDARD_INPUT else path
    try:
        data = sys.stdin.buffer.read() if path == STANDARD_INPUT else Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x});"
            " convert it to UTF-8"
        ) from None
