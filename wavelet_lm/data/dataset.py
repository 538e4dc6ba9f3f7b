"""From the config's `dataset` and `tokenizer` to token files: `prepare_data`."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from wavelet_lm.config import DataConfig
from wavelet_lm.data.corpus import (
    SUFFIXES,
    Corpus,
    Documents,
    content_key,
    digests,
    path_corpus,
    separated,
    separator_is_absent,
    stdlib_corpus,
    whole_text,
)
from wavelet_lm.data.encoding import EmptySplitError, kept, locked, sample_blocks, token_file
from wavelet_lm.data.files import ALL, files_by_split, short_name
from wavelet_lm.data.hub import KNOWN, hub_corpus
from wavelet_lm.data.modalities import Modality, find_modality
from wavelet_lm.data.split_tables import table_splits
from wavelet_lm.data.tokenizers import (
    CharTokenizer,
    Tokenizer,
    check_tokenizer_name,
    load_tokenizer,
    named_tokenizer,
    sentencepiece_vocab,
    train_sentencepiece,
)
from wavelet_lm.errors import UserError
from wavelet_lm.user_cache import user_cache

CACHE_VERSION = 2  # raise it when the same text would become other tokens
SENTENCEPIECE_SAMPLE_CHARS = 100_000_000
SENTENCE_CHARS = 4096  # at most 16 KiB of UTF-8, which SentencePiece still takes
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
FILE_SUFFIXES = (*SUFFIXES, ".gz", ".json", ".csv", ".tsv", ".parquet", ".zip", ".py", ".tokens")


@dataclass(frozen=True)
class TokenSplit:
    """One split as tokens.

    tokens: 1-D read-only memory map, uint8, uint16 or uint32; n_bytes: UTF-8 bytes of the text they
    encode (end-of-text tokens have none), 0 where they are no text; n_words: the canonical word
    count where one exists.
    """

    tokens: np.ndarray
    n_bytes: int
    n_words: int | None = None

    @cached_property
    def key(self) -> str:
        """What identifies the tokens, wherever they lie."""
        return hashlib.sha256(np.ascontiguousarray(self.tokens)).hexdigest()


@dataclass(frozen=True)
class TokenizedText:
    """A data set ready for training; name: short, for run folders and tables."""

    name: str
    tokenizer: Tokenizer
    train: TokenSplit
    valid: TokenSplit
    test: TokenSplit | None

    @cached_property
    def keys(self) -> dict[str, str | None]:
        """The key of each split; None where there is none."""
        splits = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: None if split is None else split.key for name, split in splits.items()}


def prepare_data(
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    log: Callable[[str], None] = print,
) -> TokenizedText:
    """Encode `config.dataset`, or open what an earlier run has encoded.

    tokenizer: use this one (evaluation, fine-tuning) and not `config.tokenizer`. `auto` is bytes
    for python-stdlib and enwik8, char for text8, sentencepiece:32000 for pg19, else gpt2.
    Raises `UserError` for whatever is wrong with the data.
    """
    if tokenizer is None and config.tokenizer != "auto":
        check_tokenizer_name(config.tokenizer)
        tokenizer = find_modality(config.tokenizer)
    if isinstance(tokenizer, Modality):
        _refuse_separator(config, tokenizer)
        return _prepare_files(config, tokenizer, log)
    corpus = open_corpus(config, log)
    folder = cache_folder(config) / f"{corpus.name}-{_short_hash(corpus.key)}"
    if tokenizer is None:
        name = corpus.default_tokenizer if config.tokenizer == "auto" else config.tokenizer
        tokenizer = _tokenizer_for(corpus, name, folder, log)
    folder /= _short_hash(tokenizer.fingerprint)

    splits: dict[str, TokenSplit] = {}
    for split, documents in corpus.splits.items():
        try:
            splits[split] = _encoded(corpus, split, documents, tokenizer, folder, log)
        except EmptySplitError as error:
            if split == "test":
                log(f"{corpus.name}: the test split has no text and is left out")
                continue
            advice = "give more text" if split == "train" else "give more text or change split"
            raise UserError(f"{config.dataset}: {error}; {advice}") from error
    for split in ("train", "valid"):
        if split not in splits:
            raise UserError(f"{config.dataset}: the {split} split has no text; change split")
    return TokenizedText(
        corpus.name, tokenizer, splits["train"], splits["valid"], splits.get("test")
    )


def prepare_split(
    config: DataConfig, tokenizer: Tokenizer, split: str | None, log: Callable[[str], None] = print
) -> tuple[str, str, TokenSplit]:
    """One split of `config.dataset` as tokens, and nothing else of it: what an evaluation scores.

    Args:
        split: `train`, `valid` or `test`, as training has it. None: a text of one's own is scored
            whole (of a folder that names splits the test, else the valid split), and of a data
            set with splits of its own test, or valid where there is none.

    Returns:
        The name of the data, the split (`all` for a whole text), and its tokens.

    Raises:
        UserError: whatever is wrong with the data; there is no such split.
    """
    if isinstance(tokenizer, Modality):
        _refuse_separator(config, tokenizer)
        return _prepare_file_split(config, tokenizer, split, log)
    path = Path(config.dataset).expanduser()
    is_own = config.dataset not in ("", "python-stdlib", *KNOWN) and path.exists()
    if split is None and is_own:
        split, documents, key = whole_text(path, log, config.document_separator)
        corpus = Corpus(short_name(path), {split: documents}, key, tokenizer.name)
    else:
        corpus = open_corpus(config, log, complete=False)
        if split is None:
            split = "test" if "test" in corpus.splits else "valid"
    if split not in corpus.splits:
        there = ", ".join(corpus.splits)
        raise UserError(f"{corpus.name} has no {split} split; use --split with one of {there}")
    folder = cache_folder(config) / f"{corpus.name}-{_short_hash(corpus.key)}"
    folder /= _short_hash(tokenizer.fingerprint)
    try:
        return (
            corpus.name,
            split,
            _encoded(corpus, split, corpus.splits[split], tokenizer, folder, log),
        )
    except EmptySplitError as error:
        raise UserError(f"{config.dataset}: {error}; give more text") from error


def _refuse_separator(config: DataConfig, modality: Modality) -> None:
    if config.document_separator is not None:
        raise UserError(
            f"document_separator is for text and {modality.name} reads {modality.kind} files;"
            " leave it out"
        )


def _prepare_file_split(
    config: DataConfig, modality: Modality, split: str | None, log: Callable[[str], None]
) -> tuple[str, str, TokenSplit]:
    """The same for files that are no text."""
    path = Path(config.dataset).expanduser()
    if split is None and path.exists() and not table_splits(path, modality, log):
        files = files_by_split(path, modality, log, complete=False)
        if ALL in files or "train" not in files:
            split = next(name for name in ("test", "valid", ALL) if name in files)
            name, tokens = _tokens_of(path, {split: files[split]}, config, modality, log)
            if not len(tokens[split]):
                raise UserError(f"{config.dataset}: no tokens to score; give more files")
            return name, split, TokenSplit(tokens[split], 0)
    data = _prepare_files(config, modality, log)
    if split is None:
        split = "test" if data.test is not None else "valid"
    chosen: TokenSplit | None = getattr(data, split)
    if chosen is None:
        raise UserError(f"{data.name} has no {split} split; use --split valid")
    return data.name, split, chosen


def cache_folder(config: DataConfig) -> Path:
    """Where encoded texts are kept: `cache_dir`, or by default the user's cache."""
    is_default = config.cache_dir == type(config).__dataclass_fields__["cache_dir"].default
    return user_cache() if is_default else Path(config.cache_dir).expanduser()


def _encoded(
    corpus: Corpus,
    split: str,
    documents: Documents,
    tokenizer: Tokenizer,
    folder: Path,
    log: Callable[[str], None],
) -> TokenSplit:
    encoded = token_file(folder / f"{split}.bin", documents, tokenizer, log)
    _check(corpus, split, tokenizer, encoded.n_bytes, len(encoded.tokens))
    log(
        f"{corpus.name} {split}: {len(encoded.tokens):,} tokens ({tokenizer.name}),"
        f" {encoded.n_bytes:,} bytes"
    )
    return TokenSplit(encoded.tokens, encoded.n_bytes, corpus.n_words.get(split))


def _prepare_files(
    config: DataConfig, modality: Modality, log: Callable[[str], None]
) -> TokenizedText:
    """The same for files that are no text; those that name no splits are cut by position."""
    path = Path(config.dataset).expanduser()
    if not config.dataset or not path.exists():
        raise UserError(
            f"tokenizer {modality.name} reads {modality.kind} files"
            f" ({', '.join(modality.suffixes)}) and dataset {config.dataset!r} is no file or"
            " folder; give the path of some, or another tokenizer"
        )
    files = table_splits(path, modality, log) or files_by_split(path, modality, log)
    modality = modality.fitted([file for part in files.values() for file in part])
    name, tokens = _tokens_of(path, files, config, modality, log)
    if ALL in tokens:
        tokens = _cut_tokens(tokens[ALL], config.split)
    for split in ("train", "valid"):
        if not len(tokens[split]):
            advice = "give more files" if split == "train" else "give more files or change split"
            raise UserError(f"{config.dataset}: the {split} split is empty; {advice}")
    test = tokens.get("test", ())
    return TokenizedText(
        name,
        modality,
        TokenSplit(tokens["train"], 0),
        TokenSplit(tokens["valid"], 0),
        TokenSplit(test, 0) if len(test) else None,
    )


def _tokens_of(
    path: Path,
    files: dict[str, list[Path]],
    config: DataConfig,
    modality: Modality,
    log: Callable[[str], None],
) -> tuple[str, dict[str, np.ndarray]]:
    """The name of the data, and the tokens of each part of it, from the cache or made."""
    name = short_name(path)
    key = content_key({part: digests(found, modality) for part, found in files.items()})
    folder = cache_folder(config) / f"{name}-{_short_hash(key)}"
    folder /= _short_hash(modality.fingerprint)
    tokens: dict[str, np.ndarray] = {}
    for part, found in files.items():

        def stretches(found: list[Path] = found) -> Iterator[tuple[np.ndarray, int]]:
            return ((stretch, 0) for file in found for stretch in modality.read(file))

        try:
            tokens[part] = kept(folder / f"{part}.bin", stretches, modality.vocab_size, log).tokens
        except EmptySplitError:
            tokens[part] = np.zeros(0, np.uint8)
        log(f"{name} {part}: {len(tokens[part]):,} tokens ({modality.name})")
    return name, tokens


def _cut_tokens(tokens: np.ndarray, split: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Train, valid and test one after the other, of these fractions of the tokens."""
    train, valid, test = split
    # Rounding first: 0.9 + 0.1 must not fall short of the end.
    first, second = int(train * len(tokens)), int(round(train + valid, 9) * len(tokens))
    if test == 0:
        second = len(tokens)
    return {"train": tokens[:first], "valid": tokens[first:second], "test": tokens[second:]}


def open_corpus(
    config: DataConfig, log: Callable[[str], None] = print, *, complete: bool = True
) -> Corpus:
    """What `config.dataset` means: a built-in name, else an existing path, else a hub name.

    Args:
        complete: a folder that names splits must have a train and a valid split.
    """
    dataset, separator = config.dataset, config.document_separator
    if dataset == "python-stdlib":
        return _separated(stdlib_corpus(config.split, log), separator, log)
    if dataset in KNOWN:
        return _separated(hub_corpus(dataset, config.split), separator, log)
    path = Path(dataset).expanduser()
    if dataset and path.exists():
        return path_corpus(path, config.split, log, separator, complete=complete)
    if not HUB_NAME.fullmatch(dataset) or _looks_like_a_path(dataset):
        hint = (
            "; data/ is a folder that you fill, see docs/getting-started.md"
            if dataset[:5] == "data/"
            else ""
        )
        raise UserError(f"missing data path: {dataset!r} does not exist{hint}")
    near = difflib.get_close_matches(dataset, ["python-stdlib", *KNOWN], n=1, cutoff=0.7)
    if near and "/" not in dataset:
        raise UserError(f"unknown dataset {dataset!r}; did you mean {near[0]}?")
    return _separated(hub_corpus(dataset, config.split), separator, log)


def _separated(corpus: Corpus, separator: str | None, log: Callable[[str], None]) -> Corpus:
    """The same with documents that end at the separator, where there is one."""
    if separator is None:
        return corpus
    splits = {
        part: separated(documents, separator, separator_is_absent(corpus.name, part, log))
        for part, documents in corpus.splits.items()
    }
    key = content_key({"key": corpus.key, "separator": separator})
    # What was published is the text with its separators.
    return dataclasses.replace(corpus, splits=splits, key=key, n_bytes={}, n_tokens={})


def _looks_like_a_path(dataset: str) -> bool:
    starts = dataset == "data" or dataset.startswith((".", "~", "data/"))
    return starts or dataset.lower().endswith(FILE_SUFFIXES)


def _tokenizer_for(
    corpus: Corpus, name: str, folder: Path, log: Callable[[str], None]
) -> Tokenizer:
    """The named tokenizer; those made from the text are kept in `folder` and reused."""
    if name in ("gpt2", "bytes"):
        return named_tokenizer(name)
    home = folder / name.replace(":", "-")
    if (home / "tokenizer.json").is_file():  # reading needs no lock, which needs a right to write
        return load_tokenizer(home)
    with locked(home, log):
        if (home / "tokenizer.json").is_file():
            return load_tokenizer(home)
        if name == "char":
            made = CharTokenizer.of(_all_text(corpus))
        else:
            log(f"training {name} on the training split of {corpus.name}")
            made = train_sentencepiece(_sentences(corpus), sentencepiece_vocab(name))
        if made.vocab_size:
            made.save(home)
    return made


def _all_text(corpus: Corpus) -> Iterator[str]:
    """The text of all splits, with the line breaks that are to stand between documents."""
    for documents in corpus.splits.values():
        any_text = False
        for document in documents():
            opens = any_text
            for piece in filter(None, document):
                if opens:
                    yield "\n"
                yield piece
                opens, any_text = False, True


def _sentences(corpus: Corpus) -> Iterator[str]:
    """Lines of the training split for SentencePiece, at most SENTENCE_CHARS long each."""
    for block in sample_blocks(corpus.splits["train"](), SENTENCEPIECE_SAMPLE_CHARS):
        for line in block.split("\n"):
            for start in range(0, len(line), SENTENCE_CHARS):
                yield line[start : start + SENTENCE_CHARS]


def _check(corpus: Corpus, split: str, tokenizer: Tokenizer, n_bytes: int, n_tokens: int) -> None:
    """Published texts must be exactly what was published."""
    published = corpus.n_tokens.get((tokenizer.name, split))
    counts = [("bytes", n_bytes, corpus.n_bytes.get(split))]
    counts.append((f"{tokenizer.name} tokens", n_tokens, published))
    for what, found, expected in counts:
        if expected is not None and found != expected:
            raise UserError(
                f"{corpus.name}: the {split} split has {found:,} {what}, expected {expected:,};"
                " the download is damaged or another version: clear the Hugging Face cache"
            )


def _short_hash(text: str) -> str:
    return hashlib.sha256(f"{CACHE_VERSION} {text}".encode()).hexdigest()[:16]
