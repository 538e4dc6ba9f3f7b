"""Rows of TSV and CSV files, with the file and the line in every complaint."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from wavelet_lm.atomic_files import unreadable
from wavelet_lm.errors import UserError


def table_columns(path: Path) -> list[str]:
    """The names in the first line of a table, as `read_table` takes them; none of what is no text.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with _opened(path) as file:
            return next(csv.reader(file, **_dialect(path)), [])
    except OSError as error:
        raise unreadable(error, path) from error
    except csv.Error:
        return []


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The values of `columns`, with the place ("FILE, line N") that a complaint names.

    The first line names the columns. `.csv` may quote its values; in `.tsv` a quote is a character
    like any other. Bytes that are no UTF-8 come as surrogate escapes.

    Raises:
        UserError: the file is missing or broken, or has a line without one of the columns.
    """
    try:
        with _opened(path) as file:
            rows = csv.reader(file, **_dialect(path))
            header = next(rows, [])
            missing = [name for name in columns if name not in header]
            if missing:
                raise UserError(
                    f"{path}, line 1: no column {missing[0]!r}; the first line must name"
                    f" {' and '.join(columns)}"
                )
            places = [header.index(name) for name in columns]
            for row in rows:
                place = f"{path}, line {rows.line_num}"
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{place}: {len(row)} columns where the first line names {len(header)};"
                        " mend or remove it"
                    )
                yield place, [row[i] for i in places]
    except OSError as error:
        raise unreadable(error, path) from error
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}; mend the line") from error


def _opened(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _dialect(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".tsv":
        return {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    return {"delimiter": ",", "strict": True}
