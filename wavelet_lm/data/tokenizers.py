"""Text to tokens and back: GPT-2 BPE, a trained SentencePiece model, bytes, or characters.

All four are lossless: the UTF-8 bytes of a text's tokens, joined, are the text's bytes. A tokenizer
is kept with a run as `tokenizer/tokenizer.json` (plus `sentencepiece.model`); nothing is pickled.
Files that are no text have tokenizers of their own (`modalities/`), by the same names and files.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wavelet_lm.atomic_files import atomic_path, unreadable
from wavelet_lm.data.modalities import MODALITY_NAMES, Modality, find_modality
from wavelet_lm.data.tokenizer_base import Tokenizer, Tokens
from wavelet_lm.errors import UserError
from wavelet_lm.hub_paths import local_path
from wavelet_lm.json_files import brief, read_json

if TYPE_CHECKING:
    import tiktoken

GPT2_VOCAB, GPT2_END_OF_TEXT = 50257, 50256
SPACE_MARK = "▁"  # U+2581: how SentencePiece writes a space inside its pieces
# SentencePiece drops lines that hold one of its own marks: of a space, and of an unknown piece.
RESERVED = f"[{SPACE_MARK}\u2585]"
LARGEST_SENTENCEPIECE_VOCAB = 1_000_000
MAX_SENTENCE_BYTES = 16384  # longer training sentences would be left out


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes themselves.

    Examples:
        >>> ByteTokenizer().encode("né")
        [110, 195, 169]
        >>> ByteTokenizer().decode([110, 195, 169])
        'né'
    """

    name, vocab_size = "bytes", 256

    def encode_batch(self, texts: Sequence[str], start: int = 0) -> list[Tokens]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def token_bytes(self, token: int) -> bytes:
        return bytes((token,))


class CharTokenizer(Tokenizer):
    """One token per character, for the characters of a given text in sorted order.

    Examples:
        >>> tokenizer = CharTokenizer.of(["banana"])
        >>> tokenizer.characters, tokenizer.vocab_size
        ('abn', 3)
        >>> tokenizer.encode("nab")
        [2, 0, 1]
        >>> tokenizer.encode("nut")
        Traceback (most recent call last):
        wavelet_lm.errors.UserError: character 'u' (U+0075) at position 1 is not among the 3 \
characters of this char tokenizer; use text of the same alphabet, or another tokenizer
    """

    name = "char"

    def __init__(self, characters: str):
        self.characters = characters
        self.vocab_size = len(characters)
        # Sorted code points: the rank of a character is its token.
        self._codes = np.frombuffer(characters.encode("utf-32-le"), dtype=np.uint32)

    @classmethod
    def of(cls, texts: Iterable[str]) -> CharTokenizer:
        """The tokenizer of all characters in the given texts."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        return cls("".join(sorted(seen)))

    def encode_batch(self, texts: Sequence[str], start: int = 0) -> list[Tokens]:
        batch: list[Tokens] = []
        for text in texts:
            batch.append(self._encode(text, start))
            start += len(text)
        return batch

    def _encode(self, text: str, start: int) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        tokens = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(tokens, self.vocab_size - 1)] == codes
        if not known.all():
            position = int(np.argmin(known))
            raise UserError(
                f"character {text[position]!r} (U+{codes[position]:04X}) at position"
                f" {start + position} is not among the {self.vocab_size} characters of this char"
                " tokenizer; use text of the same alphabet, or another tokenizer"
            )
        return tokens

    def token_bytes(self, token: int) -> bytes:
        return self.characters[token].encode("utf-8")

    @property
    def fingerprint(self) -> str:
        return f"char {_hash(self.characters.encode('utf-8'))}"

    def _details(self) -> dict[str, object]:
        return {"characters": self.characters}


@functools.cache
def _gpt2_encoding() -> tiktoken.Encoding:
    """An encoding of our own, without the table that its core was made of: 8 MB, read no more."""
    import tiktoken
    from tiktoken_ext.openai_public import gpt2

    encoding = tiktoken.Encoding(**gpt2())
    encoding._mergeable_ranks = {}
    return encoding


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE through tiktoken."""

    name, vocab_size, end_of_text = "gpt2", GPT2_VOCAB, GPT2_END_OF_TEXT

    def __init__(self) -> None:
        try:
            self._encoding = _gpt2_encoding()
        except Exception as error:
            # Whatever went wrong (no network, proxy, a damaged cache), the remedy is the same.
            raise UserError(
                "the GPT-2 vocabulary is neither cached nor can it be downloaded"
                f" ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that holds it,"
                " connect to the network once, or use --tokenizer sentencepiece:8192"
            ) from error

    def encode_batch(self, texts: Sequence[str], start: int = 0) -> list[Tokens]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=4)

    def token_bytes(self, token: int) -> bytes:
        if token == self.end_of_text:
            return b""
        return self._encoding.decode_single_token_bytes(token)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece BPE model with byte fallback, set up so that no text is changed.

    Spaces are U+2581 inside the model, so a literal U+2581 in the text goes around it and is
    written as its three byte tokens.
    """

    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.get_piece_size()
        self.name = f"sentencepiece:{self.vocab_size}"
        self.end_of_text = self._processor.eos_id()
        self._mark_ids = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")
        ]

    def encode_batch(self, texts: Sequence[str], start: int = 0) -> list[Tokens]:
        split = [text.split(SPACE_MARK) for text in texts]
        parts = iter(self._processor.encode([part for parts in split for part in parts]))
        batch: list[Tokens] = []
        for pieces in split:
            tokens = next(parts)
            for _ in pieces[1:]:
                tokens += self._mark_ids + next(parts)
            batch.append(tokens)
        return batch

    @cached_property
    def _bytes(self) -> list[bytes]:
        pieces = []
        for token in range(self.vocab_size):
            piece = self._processor.id_to_piece(token)
            if self._processor.is_byte(token):
                pieces.append(bytes((int(piece[1:-1], 16),)))
            elif self._processor.is_control(token) or self._processor.is_unknown(token):
                pieces.append(b"")
            else:
                pieces.append(piece.replace(SPACE_MARK, " ").encode("utf-8"))
        return pieces

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    @property
    def fingerprint(self) -> str:
        return f"{self.name} {_hash(self.model)}"

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "sentencepiece.model") as temporary:
            temporary.write_bytes(self.model)
        super().save(folder)  # the JSON last: where it is, the model is whole


# --- making and loading -------------------------------------------------------------------------


def sentencepiece_vocab(name: str) -> int:
    """The vocabulary size in `sentencepiece:VOCAB`."""
    text = name.removeprefix("sentencepiece").removeprefix(":")
    if not text.isascii() or not text.isdigit() or int(text) > LARGEST_SENTENCEPIECE_VOCAB:
        raise UserError(
            f"tokenizer {name!r}: write sentencepiece:VOCAB with the size of the vocabulary, such"
            " as sentencepiece:8192"
        )
    return int(text)


def check_tokenizer_name(name: str) -> None:
    """Raise `UserError` for a name that no tokenizer has."""
    if name.startswith("sentencepiece"):
        sentencepiece_vocab(name)
    elif name not in ("gpt2", "bytes", "char") and find_modality(name) is None:
        raise UserError(
            f"unknown tokenizer {name!r}; use gpt2, sentencepiece:VOCAB, bytes, char or auto, and"
            f" for files that are no text {', '.join(MODALITY_NAMES)}"
        )


def train_sentencepiece(sentences: Iterator[str], vocab_size: int) -> SentencePieceTokenizer:
    """A BPE model of `vocab_size` pieces (256 bytes, `<unk>` and `</s>` among them).

    sentences: lines without their line end; the caller bounds their number and length.
    """
    import sentencepiece

    def clean() -> Iterator[str]:
        for sentence in sentences:
            yield from filter(None, re.split(RESERVED, sentence))

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=clean(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=MAX_SENTENCE_BYTES,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # the result must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_vocabulary_error(str(error), vocab_size)) from error
    return SentencePieceTokenizer(model.getvalue())


def _vocabulary_error(message: str, vocab_size: int) -> str:
    name = f"tokenizer sentencepiece:{vocab_size}"
    if largest := re.search(r"value <= (\d+)", message):
        return (
            f"{name}: the training text is too small for so many pieces; the largest possible is"
            f" sentencepiece:{largest[1]}"
        )
    if smallest := re.search(r"\d+ vs (\d+)", message):
        return (
            f"{name}: too few pieces for all bytes and the characters of this text; the smallest"
            f" possible is sentencepiece:{smallest[1]}"
        )
    if "sentences_.empty" in message:
        return f"{name}: the training split has no text to train on"
    return f"{name}: training failed ({' '.join(message.split())})"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run folder, of its `tokenizer` folder, or beside a checkpoint file."""
    path = local_path(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such run folder or checkpoint")
    file = tokenizer_file(path)
    if file is None:
        raise UserError(f"{path}: there is no tokenizer (tokenizer/tokenizer.json) here")
    return _read(file)


def load_modality(path: str | Path) -> Modality | None:
    """What `load_tokenizer` finds, if its tokens are no text; None also where it cannot be read."""
    file = tokenizer_file(path)
    try:
        return file and find_modality(**read_json(file))
    except (ValueError, TypeError, AttributeError, UserError):
        return None


def tokenizer_file(path: str | Path) -> Path | None:
    """Where `load_tokenizer` reads, None where there is nothing to read."""
    path = local_path(path)
    folder = path if path.is_dir() else path.parent
    files = (place / "tokenizer.json" for place in (folder / "tokenizer", folder))
    return next(filter(Path.is_file, files), None)


def _read(file: Path) -> Tokenizer:
    details = read_json(file)
    name = details.get("name") if isinstance(details, dict) else None
    if not isinstance(name, str):
        raise UserError(
            f"{file}: {brief(details)} says no tokenizer; there must be an object with a name, such"
            ' as {"name": "bytes"}'
        )
    try:
        if name == "char":
            characters = details.get("characters")
            if not isinstance(characters, str):
                raise ValueError(f"its characters are {brief(characters)}, not a text")
            if characters != "".join(sorted(set(characters))):
                raise ValueError("its characters must be distinct and in order")
            return CharTokenizer(characters)
        if name.startswith("sentencepiece"):
            return SentencePieceTokenizer((file.parent / "sentencepiece.model").read_bytes())
        if modality := find_modality(**details):
            if not modality.is_fitted:
                raise ValueError("it does not say what its files have in common")
            return modality
    except UserError as error:  # of a modality's name
        raise UserError(f"{file}: {error}") from error
    except OSError as error:
        raise unreadable(error, file.parent / "sentencepiece.model") from error
    except TypeError as error:  # of a modality's own keys
        raise UserError(
            f"{file}: {brief(details)} has other keys than a tokenizer {name!r}; copy the file of"
            " the run again"
        ) from error
    except RuntimeError as error:
        model = file.parent / "sentencepiece.model"
        raise UserError(f"{model}: cannot be read as a SentencePiece model") from error
    except ValueError as error:
        raise UserError(f"{file}: cannot be read as a tokenizer: {error}") from error
    if name not in ("gpt2", "bytes"):
        raise UserError(f"{file}: there is no tokenizer {brief(name)}")
    return named_tokenizer(name)


def named_tokenizer(name: str) -> Tokenizer:
    """The tokenizers that need no training text: gpt2 and bytes."""
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    raise UserError(f"unknown tokenizer {name!r}")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
