"""Film reviews as bytes, to be judged good or bad: the Long Range Arena's text task.

A review is its first `max_length` bytes, each a token of its own; the byte 0, which no text holds,
is the padding. Read from

    FOLDER/train/{neg,pos}/*.txt, FOLDER/test/{neg,pos}/*.txt      the layout of aclImdb
    FOLDER/{neg,pos}/*.txt                                         one collection, split here
    FOLDER/{train,test}.{tsv,csv}, or one FILE.{tsv,csv}           columns label and text

A `valid` beside train and test is used; otherwise a part of the training reviews is.

Source: Maas et al., "Learning Word Vectors for Sentiment Analysis", 2011.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from wavelet_lm.atomic_files import unreadable
from wavelet_lm.data.files import listed, only_one
from wavelet_lm.data.tasks.examples import Task, TokenExamples, cut
from wavelet_lm.data.tasks.tables import read_table
from wavelet_lm.errors import UserError

VOCAB_SIZE = 256
CLASSES = ("neg", "pos")
LABELS = {"0": 0, "neg": 0, "negative": 0, "1": 1, "pos": 1, "positive": 1}
MAX_LENGTH = 2048
TABLES = (".tsv", ".csv")
DOWNLOAD = (
    "download aclImdb_v1.tar.gz (the Large Movie Review Dataset, 84 MB) from"
    " https://ai.stanford.edu/~amaas/data/sentiment/, unpack it in data/ and give"
    " --data data/aclImdb; a TSV or CSV file with columns label and text does too"
)
# The arena validates on the test reviews; here a tenth of the training reviews is kept for it.
VALID_SHARE = 0.1


def load(path: Path, seed: int, max_length: int = MAX_LENGTH) -> Task:
    """The task; `seed` draws the validation reviews (and the test ones of a single collection).

    Raises:
        UserError: max_length is below 1, the data are missing, or a file or line is not as it
            should be.
    """
    if max_length < 1:
        raise UserError(f"max_length is {max_length}; it must be 1 byte or more")
    if not path.exists():
        raise UserError(f"{path} does not exist; {DOWNLOAD}")
    train, test = _source(path, "train"), _source(path, "test")
    valid = _source(path, "valid")
    if train and test:
        trained, tested = (_read(source, max_length) for source in (train, test))
        if valid:
            valid = _read(valid, max_length)
        else:
            trained, valid = cut(trained, (1 - VALID_SHARE, VALID_SHARE), seed, path)
    elif train or test or valid:
        have = next(source for source in (train, test, valid) if source)
        missing = "test" if train else "train"
        raise UserError(f"{path}: there is {have.name} but no {missing}; add it, or give one table")
    else:
        shares = (1 - 2 * VALID_SHARE, VALID_SHARE, VALID_SHARE)
        trained, valid, tested = cut(_read(_collection(path), max_length), shares, seed, path)
    return Task("text", VOCAB_SIZE, len(CLASSES), trained, valid, tested)


def _source(folder: Path, part: str) -> Path | None:
    """The folder or table of a split, None where there is none."""
    return only_one([folder / part, *(folder / f"{part}{suffix}" for suffix in TABLES)])


def _collection(path: Path) -> Path:
    if path.suffix.lower() in TABLES or all((path / name).is_dir() for name in CLASSES):
        return path
    raise UserError(
        f"{path}: holds neither train and test, nor neg and pos, nor is it a .tsv or .csv file;"
        f" {DOWNLOAD}"
    )


def _read(source: Path, max_length: int) -> TokenExamples:
    rows = _folder_rows(source) if source.is_dir() else _table_rows(source)
    examples = TokenExamples.of((text[:max_length], label) for text, label in rows)
    missing = [name for i, name in enumerate(CLASSES) if i not in examples.labels]
    if missing:
        raise UserError(f"{source}: holds no review that is {missing[0]}; both classes are needed")
    return examples


def _folder_rows(folder: Path) -> Iterator[tuple[bytes, int]]:
    for label, name in enumerate(CLASSES):
        if not (folder / name).exists():
            continue
        for file in listed(folder / name):
            if file.name.startswith("."):
                continue
            if file.suffix.lower() != ".txt":
                what = "a folder" if file.is_dir() else "no .txt file"
                raise UserError(f"{file}: {what} among the reviews; move it elsewhere")
            try:
                text = file.read_bytes()
            except OSError as error:
                raise unreadable(error, file) from error
            yield _checked(text, str(file)), label


def _table_rows(path: Path) -> Iterator[tuple[bytes, int]]:
    for place, (label, text) in read_table(path, ("label", "text")):
        word = label.strip().lower()
        if word not in LABELS:
            raise UserError(f"{place}: the label is {label!r}; it must be {' or '.join(LABELS)}")
        yield _checked(text.encode("utf-8", "surrogateescape"), place), LABELS[word]


def _checked(text: bytes, place: str) -> bytes:
    if not text.strip():
        raise UserError(f"{place}: the review is empty; mend or remove it")
    return text
