"""The files of a data set, and the splits that their names say.

Nothing is left out in silence: links are followed, and what cannot be read, what is there twice and
names that contradict each other are errors with their paths.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from wavelet_lm.atomic_files import unreadable
from wavelet_lm.data.modalities import names_for
from wavelet_lm.errors import UserError

SPLIT_NAMES = {
    "train": ("train", "training", "trainset"),
    "valid": (
        "valid",
        "val",
        "validation",
        "validating",
        "dev",
        "development",
        "validset",
        "devset",
    ),
    "test": ("test", "testing", "eval", "evaluation", "heldout", "holdout", "testset"),
}
SPLIT_OF = {word: split for split, words in SPLIT_NAMES.items() for word in words}
ALL = "all"  # the part of files that name no splits
LONGEST_NAME = 100  # bytes of a data set's name, from which those of folders and caches are made


class FileKind(Protocol):
    """kind: the files in one word; suffixes: theirs, in small letters."""

    kind: str
    suffixes: tuple[str, ...]


def files_by_split(
    path: Path, kind: FileKind, log: Callable[[str], None], *, complete: bool = True
) -> dict[str, list[Path]]:
    """The files of this kind at `path`, by the splits that their names say; if none, as `ALL`.

    A folder names its splits by files or subfolders `train`, `valid` and `test`, or by any names
    that hold such a word (`wiki.train.txt`, `test-00000-of-00002.jsonl`).

    Args:
        complete: there must be a train and a valid split, if any.

    Raises:
        UserError: there are no such files, a part cannot be read or stands there twice, or names
            say splits in a way that leaves a choice.
    """
    files = find_files(path, kind, log)
    if not path.is_dir():
        return {ALL: files}
    # What all files share above them tells none from another.
    above = Path(os.path.commonpath([file.parent for file in files]))
    places = {file: file.relative_to(above) for file in files}
    exact = {file: _exact_word(place) for file, place in places.items()}
    unclear: list[Path] = []
    words = {file: exact[file] or _word_inside(place, unclear) for file, place in places.items()}
    named = {SPLIT_OF[word] for word in exact.values() if word is not None}
    if {"train", "valid"} <= named:
        # Names that are nothing but the word make a whole data set; others may add a split to it.
        unclear = []
        for file, word in words.items():
            if exact[file] is None and SPLIT_OF.get(word) in named:
                words[file] = None
    found: dict[str, list[Path]] = {}
    for file, word in words.items():
        if word is not None:
            found.setdefault(SPLIT_OF[word], []).append(file)
    in_folders = [place for place in unclear if len(place.parts) > 1]
    if not ({"valid", "test"} & found.keys() or named or in_folders):
        # A word such as train in some name means nothing by itself.
        if complete:
            log(f"{path}: no splits are named; {len(files):,} files, cut by position")
        return {ALL: files}
    if unclear:
        raise UserError(
            f"{path}: the name {unclear[0]} says more than one split; rename it so that it says one"
            " or none"
        )
    _refuse_two_words(path, words)
    missing = [split for split in ("train", "valid") if split not in found]
    if complete and missing:
        have = " and ".join(f"a {s} split ({some(found[s], path)})" for s in found)
        raise UserError(
            f"{path}: there is {have} but no {missing[0]}; add a file or folder of that name, or"
            " rename what is there to have the text split by position"
        )
    log(f"{path}: {'; '.join(f'{s}: {some(found[s], path)}' for s in SPLIT_NAMES if s in found)}")
    unused = [file for file in files if words[file] is None]
    if unused:
        log(f"{path}: not used, as no split is named: {some(unused, path)}")
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def find_files(
    path: Path, kind: FileKind, log: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """The supported file `path`, or those in the folder, sorted by their relative path.

    What else is in the folder is logged.

    Raises:
        UserError: as `files_by_split`.
    """
    formats = "/".join(kind.suffixes)
    if not path.is_dir():
        if not path.name.lower().endswith(kind.suffixes):
            advice = _other_kind([path], kind)
            raise UserError(f"{path}: not a {kind.kind} file that is supported ({formats}){advice}")
        return [path]
    inside = sorted(walk(path), key=lambda file: file.relative_to(path).as_posix())
    files = [file for file in inside if file.name.lower().endswith(kind.suffixes)]
    if not files:
        advice = _other_kind(inside, kind)
        raise UserError(f"{path}: the folder holds no {kind.kind} files ({formats}){advice}")
    others = [file for file in inside if not file.name.lower().endswith(kind.suffixes)]
    if others:
        log(f"{path}: not used, as no {kind.kind} files ({formats}): {some(others, path)}")
    unpacked: dict[str, Path] = {}
    known: dict[tuple[int, int], Path] = {}
    for file in files:
        status = _status(file)
        same = known.setdefault((status.st_dev, status.st_ino), file)
        if same != file:
            raise UserError(
                f"{path}: {same.relative_to(path)} and {file.relative_to(path)} are one file, there"
                " twice through a link; remove one of them"
            )
        other = unpacked.setdefault(re.sub(r"\.gz$", "", str(file), flags=re.IGNORECASE), file)
        if other != file:
            raise UserError(
                f"{path}: {other.relative_to(path)} and {file.relative_to(path)} are one text"
                " twice; remove one of them"
            )
    return files


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones, through links too, but not in circles.

    Raises:
        UserError: a folder that cannot be listed or is there twice, a link that leads nowhere, and
            what is neither file nor folder.
    """
    seen: dict[tuple[int, int], Path] = {}

    def inside(folder: Path, above: set[tuple[int, int]]) -> Iterator[Path]:
        status = _status(folder)
        place = (status.st_dev, status.st_ino)
        if place in above:  # a link back up
            return
        other = seen.setdefault(place, folder)
        if other != folder:
            raise UserError(f"{folder} and {other} are one folder; remove the link to it")
        for entry in listed(folder):
            if entry.name.startswith("."):
                continue
            mode = _status(entry).st_mode
            if stat.S_ISDIR(mode):
                yield from inside(entry, above | {place})
            elif stat.S_ISREG(mode):
                yield entry
            else:
                raise UserError(f"{entry}: neither a file nor a folder; remove it")

    return inside(folder, set())


def listed(folder: Path) -> list[Path]:
    """What a folder holds, sorted; unlike by `glob`, one that cannot be read is not an empty one.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries)
    except OSError as error:
        raise unreadable(error, folder) from error


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError as error:
        if path.is_symlink():
            where = path.readlink()
            raise UserError(f"{path}: a link to {where}, which is not there") from error
        raise unreadable(error, path) from error
    except OSError as error:
        raise unreadable(error, path) from error


def short_name(path: Path) -> str:
    """The name of a data set for folders and tables, of at most `LONGEST_NAME` bytes."""
    path = path.resolve()
    stem = path.name if path.is_dir() else path.name.split(".")[0]
    if not path.is_dir() and stem in ("input", "train", "text", "data"):
        stem = path.parent.name
    # A name of a file may be no UTF-8, and a cut may fall inside a character.
    return os.fsencode(stem)[:LONGEST_NAME].decode(errors="ignore") or "text"


def _exact_word(place: Path) -> str | None:
    """The word of a split that the file or the folder at the top is named by, nothing else."""
    stem = place.parts[0].lower().split(".")[0]
    return stem if stem in SPLIT_OF else None


def _word_inside(place: Path, unclear: list[Path]) -> str | None:
    """The word of a split in the file's name or in those of its folders.

    A place whose names say several splits is added to `unclear`.
    """
    name = re.sub("h[eo]ld.?out", "heldout", place.as_posix().lower())
    words = [word for word in re.findall(r"[^\W\d_]+", name) if word in SPLIT_OF]
    if len({SPLIT_OF[word] for word in words}) > 1:
        unclear.append(place)
        return None
    return words[0] if words else None


def _refuse_two_words(path: Path, words: dict[Path, str | None]) -> None:
    """`val.txt` beside `valid.txt`: which is it?"""
    first: dict[str, tuple[str, Path]] = {}
    for file, word in words.items():
        if word is None:
            continue
        known, example = first.setdefault(SPLIT_OF[word], (word, file))
        if known != word:
            raise UserError(
                f"{path}: {example.relative_to(path)} and {file.relative_to(path)} both name the"
                f" {SPLIT_OF[word]} split; which is it? Remove or rename the other"
            )


def _other_kind(files: list[Path], kind: FileKind) -> str:
    """What to do where files meant for other tokenizers are taken for text."""
    found = names_for(files) if kind.kind == "text" else None
    return f"; for {found[0]} files use --tokenizer {' or '.join(found[1])}" if found else ""


def only_one(places: list[Path]) -> Path | None:
    """The place of these that exists, None where none does.

    Raises:
        UserError: there are two, and nothing says which is meant.
    """
    found = [place for place in places if place.exists()]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name} are both there; remove or rename one")
    return found[0] if found else None


def some(files: list[Path], folder: Path) -> str:
    """Files in words, for a complaint: the first three, and how many more."""
    names = [file.relative_to(folder).as_posix() for file in files[:3]]
    return ", ".join(names) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
