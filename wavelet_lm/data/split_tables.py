"""The splits that a data set's table names, as MAESTRO (v3.0.0) has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from wavelet_lm.data.files import SPLIT_OF, find_files, listed, some
from wavelet_lm.data.modalities import Modality
from wavelet_lm.data.tasks.tables import read_table, table_columns
from wavelet_lm.errors import UserError


def table_splits(
    folder: Path, modality: Modality, log: Callable[[str], None]
) -> dict[str, list[Path]]:
    """The files of a folder by the splits of its table; empty without one.

    Raises:
        UserError: a file, the table or a line of it is not as it should be.
    """
    found: dict[str, list[Path]] = {}
    for table in listed(folder) if folder.is_dir() else []:
        if table.suffix.lower() != ".csv" or table.name.startswith("."):
            continue
        columns = table_columns(table)
        if modality.column not in columns or "split" not in columns:
            continue
        for place, (name, split) in read_table(table, (modality.column, "split")):
            part = SPLIT_OF.get(split.strip().lower())
            if part is None:
                raise UserError(
                    f"{place}: split is {split!r}; it must be train, validation or test"
                )
            if not (folder / name).is_file():
                raise UserError(f"{place}: there is no {folder / name}; unpack all of the data set")
            found.setdefault(part, []).append(folder / name)
        for part in ("train", "valid"):
            if part not in found:
                raise UserError(f"{table}: names no {part} files; remove it to split by position")
        named = {file.resolve() for files in found.values() for file in files}
        unused = [file for file in find_files(folder, modality) if file.resolve() not in named]
        if unused:
            log(f"{folder}: not used, as {table.name} does not name them: {some(unused, folder)}")
        return found
    return {}
