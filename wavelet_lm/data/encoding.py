"""Documents to token files: streamed in bounded memory, cached by content, written atomically.

A token file is the bare tokens in the smallest unsigned integer that holds the vocabulary. The
JSON beside it holds the counts and is written last, so a token file counts only if its JSON agrees.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wavelet_lm.atomic_files import as_user_error, atomic_path, write_text
from wavelet_lm.data.corpus import Document, Documents
from wavelet_lm.data.tokenizer_base import Tokenizer
from wavelet_lm.errors import UserError

PIECE_CHARS = 1 << 16  # what a thread encodes at a time
BATCH_CHARS = 1 << 20  # what the threads share
LONGEST_UNCUT_CHARS = 1 << 22
SAFE_CUT = re.compile(r"(?<=\S)[ \n]")


# Stretches of tokens, each with the UTF-8 bytes of its text (0 where it is none).
Stretches = Iterator[tuple[np.ndarray, int]]


EMPTY = {"tokens": 0, "bytes": 0}


class EmptySplitError(UserError):
    """A split without any tokens."""


@dataclass(frozen=True)
class TokenFile:
    """tokens: 1-D read-only memory map of uint8, uint16 or uint32; n_bytes: UTF-8 bytes of text."""

    tokens: np.ndarray
    n_bytes: int


def token_file(
    path: Path, documents: Documents, tokenizer: Tokenizer, log: Callable[[str], None]
) -> TokenFile:
    """The token file of a text at `path`, made first where it is missing or not whole.

    Raises `EmptySplitError` when there is no text, `UserError` for a full disk, and what the
    documents raise; then nothing is left behind.
    """
    return kept(path, lambda: encode_documents(documents(), tokenizer), tokenizer.vocab_size, log)


def kept(
    path: Path, encode: Callable[[], Stretches], vocab_size: int, log: Callable[[str], None]
) -> TokenFile:
    """The token file at `path`, made of what `encode` yields as `token_file` has it."""
    dtype = np.min_scalar_type(vocab_size - 1)
    finished = _open_finished(path, dtype)
    if finished is None:
        _refuse_empty(path)
        with locked(path, log):
            # Another process may have written it while this one waited.
            finished = _open_finished(path, dtype) or _write(path, encode(), dtype)
    return finished


def _refuse_empty(path: Path) -> None:
    """Raise `EmptySplitError` where it was found before that the split has no text."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if json.loads(_counts_path(path).read_text(encoding="utf-8")) == EMPTY:
            raise EmptySplitError(f"the {path.stem} split has no text")


def _open_finished(path: Path, dtype: np.dtype) -> TokenFile | None:
    try:
        counts = json.loads(_counts_path(path).read_text(encoding="utf-8"))
        n_tokens, n_bytes = counts["tokens"], counts["bytes"]
        if path.stat().st_size != n_tokens * dtype.itemsize:
            return None
        return TokenFile(np.memmap(path, dtype=dtype, mode="r", shape=(n_tokens,)), n_bytes)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(path: Path, stretches: Stretches, dtype: np.dtype) -> TokenFile:
    from tqdm import tqdm

    for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of a run that was killed
        stale.unlink(missing_ok=True)
    n_tokens = n_bytes = 0
    bar = tqdm(
        desc=f"encoding {path.stem}", unit=" tokens", unit_scale=True, disable=None, leave=False
    )
    with bar, atomic_path(path) as temporary, temporary.open("wb") as file:
        for tokens, size in stretches:
            file.write(tokens.astype(dtype, copy=False).tobytes())
            n_tokens += len(tokens)
            n_bytes += size
            bar.update(len(tokens))
        if n_tokens == 0:
            write_text(_counts_path(path), json.dumps(EMPTY))
            raise EmptySplitError(f"the {path.stem} split has no text")
    write_text(_counts_path(path), json.dumps({"tokens": n_tokens, "bytes": n_bytes}))
    return TokenFile(np.memmap(path, dtype=dtype, mode="r", shape=(n_tokens,)), n_bytes)


def _counts_path(path: Path) -> Path:
    return path.with_suffix(".json")


def encode_documents(documents: Iterator[Document], tokenizer: Tokenizer) -> Stretches:
    """Tokens of consecutive stretches of the documents, and the UTF-8 bytes of each stretch.

    Between documents that have text stands the tokenizer's end-of-text token, which has no bytes;
    where it has none, a line break, of one byte, unless the text before ends with one.
    """
    position, ends_line = 0, False
    separator, n_bytes = None, 0
    for texts, opens in _batches(documents):
        parts, added = [], 0
        encoded = tokenizer.encode_batch(texts, start=position)
        for text, tokens, opens_document in zip(texts, encoded, opens, strict=True):
            if opens_document:
                if separator is None:
                    separator, n_bytes = _separator(tokenizer)
                if not (n_bytes and ends_line):
                    parts.append(separator)
                    added += n_bytes
            parts.append(np.asarray(tokens, dtype=np.uint32))
            ends_line = text.endswith("\n")
        position += sum(map(len, texts))
        yield np.concatenate(parts), added + sum(len(text.encode("utf-8")) for text in texts)


def _separator(tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """What stands between documents, and its bytes of text; nothing where there is nothing."""
    if tokenizer.end_of_text is not None:
        return np.array([tokenizer.end_of_text], dtype=np.uint32), 0
    try:
        return np.asarray(tokenizer.encode("\n"), dtype=np.uint32), 1
    except UserError:  # a vocabulary of characters that lacks it
        return np.zeros(0, dtype=np.uint32), 0


def _batches(documents: Iterator[Document]) -> Iterator[tuple[list[str], list[bool]]]:
    """Pieces of text, about BATCH_CHARS together, and whether each opens a further document."""
    texts: list[str] = []
    opens: list[bool] = []
    size, any_text = 0, False
    for document in documents:
        opens_document = any_text
        for piece in safe_pieces(document):
            texts.append(piece)
            opens.append(opens_document)
            opens_document, any_text = False, True
            size += len(piece)
            if size >= BATCH_CHARS:
                yield texts, opens
                texts, opens, size = [], [], 0
    if texts:
        yield texts, opens


def safe_pieces(document: Document, size: int = PIECE_CHARS) -> Iterator[str]:
    """The document cut into pieces of about `size` characters that can be encoded one by one.

    Cuts are made before a space or line end that follows a non-whitespace character. No GPT-2 word
    and no SentencePiece piece has such a place inside, and what they look at ahead and behind ends
    there, so the pieces' tokens are the document's. Only a text without any such place for
    LONGEST_UNCUT_CHARS is cut elsewhere.
    """
    held: list[str] = []
    held_size = 0
    for text in document:
        for start in range(0, len(text), size):
            held.append(text[start : start + size])
            held_size += len(held[-1])
            if held_size < size:
                continue
            whole = "".join(held)
            cut = _last_safe_cut(whole)
            if cut is None and held_size >= LONGEST_UNCUT_CHARS:
                cut = held_size
            if cut is not None:
                yield whole[:cut]
                whole = whole[cut:]
            held, held_size = [whole], len(whole)
    if held_size:
        yield "".join(held)


def _last_safe_cut(text: str) -> int | None:
    for tail in (256, 8192, len(text)):
        cuts = [match.start() for match in SAFE_CUT.finditer(text, max(1, len(text) - tail))]
        if cuts:
            return cuts[-1]
    return None


@contextmanager
def locked(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock beside `path`, whose folder is made; says so in the log when it has to wait."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"another run is preparing {path}; waiting for it")
            lock.acquire()
    except OSError as error:
        raise as_user_error(error, path) from error
    try:
        yield
    finally:
        lock.release()


def sample_blocks(documents: Iterator[Document], limit: int) -> list[str]:
    """Blocks of text spread evenly over the documents, at most about `limit` characters together.

    All of the text where it fits; else every second, fourth, … block.
    """
    blocks: list[str] = []
    stride = 1
    for index, block in enumerate(_blocks(documents)):
        if index % stride == 0:
            blocks.append(block)
            if len(blocks) * PIECE_CHARS > limit:
                blocks, stride = blocks[::2], stride * 2
    return blocks


def _blocks(documents: Iterator[Document]) -> Iterator[str]:
    """The text of the documents, one per line or more, in blocks of about PIECE_CHARS."""
    held: list[str] = []
    held_size = 0
    for document in documents:
        for piece in safe_pieces(document):
            held.append(piece)
            held_size += len(piece)
            if held_size >= PIECE_CHARS:
                yield "".join(held)
                held, held_size = [], 0
        held.append("\n")
    yield "".join(held)
