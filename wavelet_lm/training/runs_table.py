"""`runs.md`: one row per finished run."""

import errno
import os
from pathlib import Path

from wavelet_lm.atomic_files import as_user_error, write_text
from wavelet_lm.errors import UserError
from wavelet_lm.training.run_folder import check_folder

ADVICE = "give --runs_file another name, or none"

COLUMNS = (
    "date",
    "name",
    "data",
    "parameters",
    "key settings",
    "split",
    "bits/byte",
    "perplexity/word",
    "tokens/s",
    "peak memory",
    "hours",
    "command",
)
HEADER = f"""# Runs

One row per finished run, written by `train.py`. Bits per byte and word perplexity are those of
sliding windows (stride block_size / 2) over the whole split; word perplexity only where a
canonical word count exists. Tokens/s is training alone, without evaluation.

| {" | ".join(COLUMNS)} |
|{" --- |" * len(COLUMNS)}
"""


def append_run(path: str | Path, row: dict[str, str]) -> None:
    """Add a row (a value per column, missing ones are left empty); creates the table.

    Safe when several runs end together: a lock file beside the table orders them.

    Raises:
        UserError: the table cannot be read or written.
    """
    from filelock import FileLock

    path = Path(path).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock(path)):
            write_text(path, _text(path).rstrip("\n") + f"\n{row_line(row)}\n")
    except OSError as error:
        raise as_user_error(error, path) from error


def row_line(row: dict[str, str]) -> str:
    """The row as a line of the table."""
    cells = [row.get(column, "").replace("|", "\\|").replace("\n", " ") for column in COLUMNS]
    return f"| {' | '.join(cells)} |"


def check_table(path: str | Path | None) -> None:
    """Raise `UserError` before a run that could not add its row at its end."""
    if not path:
        return
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _text(path)
        if _lock(path).exists() and not os.access(_lock(path), os.W_OK):
            raise PermissionError(errno.EACCES, f"nor {_lock(path).name} beside it")
        check_folder(path.parent)
    except OSError as error:
        raise UserError(f"{as_user_error(error, path)}; {ADVICE}") from error
    except UserError as error:
        raise UserError(f"{error}; {ADVICE}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else HEADER
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not a table of runs (not UTF-8)") from error


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")
