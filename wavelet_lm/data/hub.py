"""Data sets of the Hugging Face hub, through the `datasets` library.

Only data sets of plain files (Parquet, JSON, text) can be loaded; `datasets` has given up loading
scripts, so some well-known sets come from mirrors.
"""

from __future__ import annotations

import logging
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.data.corpus import (
    PIECE_BYTES,
    Corpus,
    Document,
    Documents,
    content_key,
    cut_by_position,
    reader,
)
from wavelet_lm.data.files import SPLIT_NAMES
from wavelet_lm.errors import UserError

ROWS_AT_ONCE = 64  # a row of pg19 is a book


@dataclass(frozen=True)
class HubSet:
    """How a hub data set becomes documents.

    repository, config: arguments of `datasets.load_dataset`; joined: all rows of a split are one
    document, with this between them; archive, edges: not on the hub, but a zip file of one text at
    this address, to be cut at these two byte positions; the rest as in `Corpus`.
    """

    repository: str = ""
    config: str | None = None
    joined: str | None = None
    archive: str = ""
    edges: tuple[int, int] | None = None
    default_tokenizer: str = "gpt2"
    n_words: dict[str, int] = field(default_factory=dict)
    n_bytes: dict[str, int] = field(default_factory=dict)
    n_tokens: dict[tuple[str, str], int] = field(default_factory=dict)


# WikiText's rows are lines that keep their own line end.
WIKITEXT = {
    "repository": "Salesforce/wikitext",
    "joined": "\n\n",
    "n_words": {"test": 245_569},
    "n_bytes": {"test": 1_296_370},
}
WIKITEXT_TOKENS = {("gpt2", "valid"): 251_048, ("gpt2", "test"): 287_644}
HUNDRED_MILLION = {"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000}

KNOWN: dict[str, HubSet] = {
    "wikitext-103": HubSet(
        config="wikitext-103-raw-v1",
        n_tokens={("gpt2", "train"): 119_721_489, **WIKITEXT_TOKENS},
        **WIKITEXT,
    ),
    # Its validation and test splits are those of WikiText-103.
    "wikitext-2": HubSet(config="wikitext-2-raw-v1", n_tokens=WIKITEXT_TOKENS, **WIKITEXT),
    "pg19": HubSet(
        "emozilla/pg19", default_tokenizer="sentencepiece:32000", n_words={"test": 6_966_499}
    ),
    "text8": HubSet("afmck/text8", default_tokenizer="char", n_bytes=HUNDRED_MILLION),
    # The hub has it only as a loading script.
    "enwik8": HubSet(
        archive="http://mattmahoney.net/dc/enwik8.zip",
        edges=(90_000_000, 95_000_000),
        default_tokenizer="bytes",
    ),
    "tinystories": HubSet("roneneldan/TinyStories"),
    "openwebtext": HubSet("Skylion007/openwebtext"),
}


def hub_corpus(name: str, split: tuple[float, ...]) -> Corpus:
    """The corpus of a known name or of `[owner/]name[:config]`.

    Missing valid and test splits are cut off the end of train by the fractions `split`.
    """
    repository, _, config = name.partition(":")
    spec = KNOWN.get(name) or HubSet(repository, config or None)
    with _explained(name):
        loaded = _archive(name, spec) if spec.archive else _load(spec)
    if isinstance(loaded, Path):
        splits = cut_by_position(reader([loaded]), edges=spec.edges)
        key = repr((spec, loaded.stat().st_size))
        return Corpus(name, splits, content_key(key), spec.default_tokenizer)
    parts = {}
    for part, names in SPLIT_NAMES.items():
        found = [name for name in names if name in loaded]
        if len(found) > 1:
            raise UserError(
                f"dataset {name}: {found[0]} and {found[1]} both name the {part} split; which is"
                " it? Save the one that is meant as files and give these"
            )
        if found:
            parts[part] = loaded[found[0]]
    if "train" not in parts:
        raise UserError(f"dataset {name}: no train split; it has {', '.join(loaded)}")
    key = repr((spec, split, [(part, rows._fingerprint) for part, rows in parts.items()]))
    if spec.joined is not None or len(parts["train"]) == 1:
        splits = {part: _documents(rows, name, spec.joined) for part, rows in parts.items()}
        splits |= _cut_text(splits, split)
    else:
        parts |= _cut_rows(parts, split)
        splits = {part: _documents(rows, name, None) for part, rows in parts.items()}
    return Corpus(
        name=repository.rpartition("/")[2],
        splits={part: splits[part] for part in SPLIT_NAMES if part in splits},
        key=content_key(key),
        default_tokenizer=spec.default_tokenizer,
        n_words=spec.n_words,
        n_bytes=spec.n_bytes,
        n_tokens=spec.n_tokens,
    )


def _load(spec: HubSet) -> dict[str, Any]:
    """Split name → `datasets.Dataset`."""
    import datasets

    # Its retries would announce themselves on the terminal before the one error.
    chatter = logging.getLogger("huggingface_hub")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        return datasets.load_dataset(spec.repository, spec.config)
    finally:
        chatter.setLevel(level)


def _archive(name: str, spec: HubSet) -> Path:
    """The archive, downloaded into the cache of `datasets` if it is not there."""
    import datasets

    path = Path(datasets.config.HF_DATASETS_CACHE) / f"{name}.zip"
    if not path.exists():
        if datasets.config.HF_HUB_OFFLINE:
            raise ConnectionError(f"offline, and {path} does not exist")
        path.parent.mkdir(parents=True, exist_ok=True)
        reply = urllib.request.urlopen(spec.archive, timeout=60)
        with reply, atomic_path(path) as part, part.open("wb") as file:
            shutil.copyfileobj(reply, file)
    return path


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """One line for the many kinds of errors of no network, no such name and no such config."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError("hub data sets need `python -m pip install datasets`") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"dataset {name} could not be loaded ({type(error).__name__}: {reason}); check the"
            " name, or load it on a connected machine and point HF_HOME to a copy of its Hugging"
            " Face cache, or give a local file or folder"
        ) from error


def _documents(rows: Any, name: str, joined: str | None) -> Documents:
    column = _text_column(rows, name)

    def texts() -> Iterator[str]:
        for batch in rows.select_columns([column]).iter(ROWS_AT_ONCE):
            for text in batch[column]:
                yield text or ""

    def one_document() -> Document:
        for index, text in enumerate(texts()):
            yield (joined + text) if index else text

    if joined is not None:
        return lambda: iter([one_document()])
    return lambda: (_pieces(text) for text in texts())


def _pieces(text: str) -> Document:
    return (text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES))


def _text_column(rows: Any, name: str) -> str:
    strings = [
        column
        for column, feature in rows.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise UserError(
        f"dataset {name}: there is no text column; its columns are {', '.join(rows.features)}"
    )


def _cut_rows(parts: dict[str, Any], split: tuple[float, ...]) -> dict[str, Any]:
    """Train and the missing splits, cut off the end of train by rows."""
    rows = parts["train"]
    n = len(rows)
    n_test = 0 if "test" in parts else int(split[2] * n)
    n_valid = 0 if "valid" in parts else int(split[1] * n)
    n_train = n - n_valid - n_test
    cut = {
        "train": (0, n_train),
        "valid": (n_train, n_train + n_valid),
        "test": (n_train + n_valid, n),
    }
    return {part: rows.select(range(*ends)) for part, ends in cut.items() if ends[0] < ends[1]}


def _cut_text(splits: dict[str, Documents], split: tuple[float, ...]) -> dict[str, Documents]:
    """Train and the missing splits, cut off the end of train by position."""
    valid = 0.0 if "valid" in splits else split[1]
    test = 0.0 if "test" in splits else split[2]
    if valid == test == 0:
        return {}
    cut = cut_by_position(splits["train"], fractions=(1 - valid - test, valid, test))
    return {part: documents for part, documents in cut.items() if part not in splits} | {
        "train": cut["train"]
    }
