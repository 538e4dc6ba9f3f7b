"""Texts before they are tokens: files, folders and the standard library as streams of documents.

A `Corpus` has, for each of train, valid and test, a sequence of documents that can be read any
number of times; a document is a stream of text pieces of bounded size, so that no file ever stands
in memory as a whole.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from wavelet_lm.atomic_files import unreadable
from wavelet_lm.data.files import ALL, FileKind, files_by_split, short_name, some
from wavelet_lm.errors import UserError

Document = Iterator[str]
Documents = Callable[[], Iterator[Document]]

SUFFIXES = (".txt", ".md", ".jsonl", ".txt.gz", ".md.gz", ".jsonl.gz")
PIECE_BYTES = 1 << 20
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class TextFiles:
    """The `FileKind` of text."""

    kind, suffixes = "text", SUFFIXES


@dataclass(frozen=True)
class Corpus:
    """A named text in splits.

    splits: documents of train, valid and, where there is one, test; key: changes whenever the
    text or the way it is split changes; default_tokenizer: what `auto` means here; n_words: the
    canonical word counts of splits that have one; n_bytes, n_tokens: what a split must hold, the
    latter per (tokenizer, split), for data sets whose exact text is published.
    """

    name: str
    splits: dict[str, Documents]
    key: str
    default_tokenizer: str
    n_words: dict[str, int] = field(default_factory=dict)
    n_bytes: dict[str, int] = field(default_factory=dict)
    n_tokens: dict[tuple[str, str], int] = field(default_factory=dict)


# --- files ---------------------------------------------------------------------------------------


def path_corpus(
    path: Path,
    split: tuple[float, ...],
    log: Callable[[str], None],
    separator: str | None = None,
    *,
    complete: bool = True,
) -> Corpus:
    """The corpus of an existing file or folder.

    A folder whose names say splits (`files.py`) has those; anything else is concatenated in sorted
    order and cut by position into the fractions `split`.

    Args:
        separator: a text in the files at which a document ends, and which is no part of it.
        complete: as `files_by_split` has it.
    """
    name = short_name(path)
    files = files_by_split(path, TextFiles, log, complete=complete)
    keys = {part: digests(found, TextFiles) for part, found in files.items()}
    marked = {} if separator is None else {"separator": separator}
    texts = {
        part: separated(reader(found), separator, separator_is_absent(path, part, log))
        for part, found in files.items()
    }
    if ALL in files:
        key = content_key({"files": keys[ALL], "split": list(split), **marked})
        splits = cut_by_position(texts[ALL], fractions=split)
    else:
        key, splits = content_key({**keys, **marked}), texts
    return Corpus(name, splits, key, "gpt2")


def whole_text(
    path: Path, log: Callable[[str], None], separator: str | None = None
) -> tuple[str, Documents, str]:
    """A text that is scored as it is: the split that it is, its documents, and its key.

    That is all of a file or of a folder; of one that names splits its test, else its valid split.
    """
    files = files_by_split(path, TextFiles, log, complete=False)
    part = next(name for name in ("test", "valid", "train", ALL) if name in files)
    key = content_key({"whole": digests(files[part], TextFiles), "separator": separator})
    absent = separator_is_absent(path, part, log)
    return part, separated(reader(files[part]), separator, absent), key


def separator_is_absent(name: object, part: str, log: Callable[[str], None]) -> Callable[[], None]:
    """What says that a part of a data set does not hold the `document_separator`."""
    where = "the text" if part == ALL else f"the {part} split"
    return lambda: log(f"{name}: document_separator does not occur in {where}")


def separated(
    documents: Documents, separator: str | None, absent: Callable[[], None] = lambda: None
) -> Documents:
    """The documents, each cut where it holds the separator; which is left out.

    absent: called once, when all of them have been read and none held it.
    """
    if not separator:
        return documents
    is_said = False

    def parts() -> Iterator[Document]:
        nonlocal is_said
        n_documents = n_parts = 0
        for document in documents():
            n_documents += 1
            for part in _parts(document, separator):
                n_parts += 1
                yield part
        if n_parts == n_documents and not is_said:
            is_said = True
            absent()

    return parts


def _parts(document: Document, separator: str) -> Iterator[Document]:
    """One after the other; each has to be read before the next is asked for, as files are."""
    pieces, more = iter(document), True
    held, start = "", 0  # a piece, and how much of it has been given out

    def part() -> Document:
        nonlocal held, start, more
        while True:
            at = held.find(separator, start)
            # What may be the beginning of a separator waits for the next piece.
            end = at if at >= 0 else max(start, len(held) - len(separator) + 1)
            text = held[start:end]
            if at >= 0:
                start = at + len(separator)
            else:
                held, start = held[end:], 0
            if text:
                yield text
            if at >= 0:
                return
            piece = next(pieces, None)
            if piece is None:
                more = False
                if held:
                    yield held
                return
            held += piece

    while more:
        one = part()
        yield one
        for _ in one:  # what the reader left
            pass


def reader(files: Iterable[Path]) -> Documents:
    """The documents of files, in their order; read anew at each call of what is returned."""
    files = list(files)

    def documents() -> Iterator[Document]:
        for file in files:
            yield from read_documents(file)

    return documents


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of one file: each row of a .jsonl, else the whole file.

    Raises `UserError` naming the place when the file is not what its name says.
    """
    if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        for row in _jsonl_rows(path):
            yield iter((row,))
    else:
        yield _text_pieces(path)


def _text_pieces(path: Path) -> Iterator[str]:
    decode = codecs.utf_8_decode
    offset, lines, rest = 0, 0, b""
    first = True
    with _open(path) as file:
        while True:
            chunk = file.read(PIECE_BYTES)
            data = rest + chunk
            try:
                text, used = decode(data, "strict", not chunk)
            except UnicodeDecodeError as error:
                line = lines + data[: error.start].count(b"\n") + 1
                raise UserError(
                    f"{path}: not valid UTF-8 at byte {offset + error.start}, line {line}; convert"
                    " the file to UTF-8"
                ) from error
            if first and text:  # a byte order mark says what the file is, and is no text of it
                text, first = text.removeprefix("\ufeff"), False
            if text:
                yield text
            if not chunk:
                return
            offset, lines, rest = offset + used, lines + text.count("\n"), data[used:]


def _jsonl_rows(path: Path) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
                text = row["text"] if isinstance(row, dict) else None
            except KeyError:
                text = None
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not valid UTF-8") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: not a JSON row ({error})") from error
            if not isinstance(text, str):
                raise UserError(f'{place}: the row has no text; rows are {{"text": "…"}}')
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"{place}: the text has half a surrogate pair") from error
            yield text


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if packed; what goes wrong while reading is a `UserError`."""
    kind = path.suffix.lower().lstrip(".")
    try:
        if kind == "zip":  # of one file
            with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
                yield file
        else:
            with gzip.open(path) if kind == "gz" else path.open("rb") as file:
                yield file
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error) as error:
        what = {"gz": "gzip"}.get(kind, kind)
        raise UserError(f"{path}: broken {what} ({error}); get the file again") from error
    except OSError as error:
        raise unreadable(error, path) from error


# --- cutting by position -------------------------------------------------------------------------


def cut_by_position(
    documents: Documents,
    fractions: tuple[float, ...] | None = None,
    edges: tuple[int, int] | None = None,
) -> dict[str, Documents]:
    """Splits that follow each other: train, valid and test by byte position in the text.

    The cuts are at the `edges`, or at the given fractions of all bytes; a character belongs to the
    split in which its first byte lies. A test fraction of 0 means no test split.
    """
    known: list[tuple[int, int]] = [edges] if edges else []

    def cuts() -> tuple[int, int]:
        if not known:  # counted when first needed: a cached token file needs no count
            n = sum(len(p.encode("utf-8")) for document in documents() for p in document)
            train, valid, test = fractions
            # Rounding first: 0.9 + 0.1 must not fall short of the end.
            end = n if test == 0 else int(round(train + valid, 9) * n)
            known.append((int(train * n), end))
        return known[0]

    splits = {
        "train": lambda: _byte_range(documents(), 0, cuts()[0]),
        "valid": lambda: _byte_range(documents(), *cuts()),
        "test": lambda: _byte_range(documents(), cuts()[1], None),
    }
    if fractions is not None and fractions[2] == 0:
        del splits["test"]
    return splits


def _byte_range(documents: Iterator[Document], start: int, stop: int | None) -> Iterator[Document]:
    """The part of the concatenated documents from byte `start` to byte `stop`."""
    position = 0

    def inside(document: Document) -> Document:
        nonlocal position
        for piece in document:
            data = piece.encode("utf-8")
            first = _character_start(data, start - position)
            last = len(data) if stop is None else _character_start(data, stop - position)
            position += len(data)
            if first < last:
                yield data[first:last].decode("utf-8")
            if stop is not None and position >= stop:
                return

    for document in documents:
        if stop is not None and position >= stop:
            return
        yield inside(document)


def _character_start(data: bytes, index: int) -> int:
    """The first start of a character at or after byte `index`, within 0 … len(data)."""
    index = max(0, index)
    while index < len(data) and data[index] & 0xC0 == 0x80:
        index += 1
    return min(index, len(data))


# --- the standard library ------------------------------------------------------------------------


def stdlib_corpus(split: tuple[float, ...], log: Callable[[str], None]) -> Corpus:
    """The source files of the running Python's standard library, without its tests.

    Each file goes to a split by the hash of its relative path, whatever else is there.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train, valid, _ = split
    files: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    sizes = dict.fromkeys(files, 0)
    hashes: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    left_out: list[Path] = []
    for path in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if STDLIB_LEFT_OUT.intersection(relative.parts):
            continue
        try:
            source = path.read_bytes()
            source.decode("utf-8")
        except (UnicodeDecodeError, OSError):  # it is not ours to mend
            left_out.append(path)
            continue
        if source:
            hashed = hashlib.sha256(relative.as_posix().encode("utf-8")).digest()
            place = int.from_bytes(hashed[:8], "big") / 2**64
            part = "train" if place < train else "valid" if place < train + valid else "test"
            files[part].append(path)
            sizes[part] += len(source)
            hashes[part].append(hashlib.sha256(source).hexdigest())
    files = {part: paths for part, paths in files.items() if paths}
    if not files:
        raise UserError(f"python-stdlib: {root} holds no source files; use another dataset")
    counts = "; ".join(f"{part} {len(files[part])} files, {sizes[part]:,} bytes" for part in files)
    log(f"python-stdlib: {counts}")
    if left_out:
        log(f"python-stdlib: not used, as no UTF-8 or not readable: {some(left_out, root)}")
    splits = {part: reader(paths) for part, paths in files.items()}
    return Corpus("python-stdlib", splits, content_key(hashes), "bytes")


# --- keys ----------------------------------------------------------------------------------------


def digests(files: Iterable[Path], kind: FileKind) -> list[str]:
    """Content and format of each file; where it lies does not matter."""
    found = []
    for path in files:
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while chunk := file.read(PIECE_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise unreadable(error, path) from error
        format = next(suffix for suffix in kind.suffixes if path.name.lower().endswith(suffix))
        found.append(f"{format} {digest.hexdigest()}")
    return found


def content_key(description: object) -> str:
    """32 hexadecimal digits that stand for a JSON-ready description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
