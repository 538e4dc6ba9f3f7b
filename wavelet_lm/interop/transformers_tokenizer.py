"""The project's tokenizers as fast ones of transformers: the same tokens, and texts without loss.

All four are a BPE of the `tokenizers` library: bytes and characters have no merges, GPT-2's are
read off its ranks, and a SentencePiece model's off its pieces. Strings such as `<|endoftext|>` in a
text are plain text, as they are in the project.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from wavelet_lm.data.modalities import Modality
from wavelet_lm.data.tokenizers import (
    SPACE_MARK,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerBase

PADDING = "<|padding|>"
# GPT-2's split into words, as Radford et al. 2019 have it.
END_OF_TEXT = "<|endoftext|>"


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerBase | None:
    """The transformers tokenizer that encodes as `tokenizer`; None where tokens are no text.

    It pads on the left. Where the project's has an end-of-text token, texts are padded with it;
    else with `<|padding|>`, whose number is one past the model's tokens and is never read.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, Modality):
        return None
    fast, special = _fast(tokenizer)
    named: dict[str, Any] = {}
    if tokenizer.end_of_text is None:
        fast.add_special_tokens([AddedToken(PADDING, special=True)])
        named["pad_token"] = PADDING
    else:
        named = dict.fromkeys(("eos_token", "bos_token", "pad_token"), special)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **named,
    )


def pad_token_id(tokenizer: Tokenizer) -> int:
    """The number of the token that texts are padded with."""
    return tokenizer.vocab_size if tokenizer.end_of_text is None else tokenizer.end_of_text


def _fast(tokenizer: Tokenizer) -> tuple[Fast, str | None]:
    """The library's tokenizer, and what its end-of-text token is called."""
    if isinstance(tokenizer, ByteTokenizer):
        return _of_bytes([bytes((i,)) for i in range(256)], [], one_word=True), None
    if isinstance(tokenizer, CharTokenizer):
        return _of_characters(tokenizer.characters), None
    if isinstance(tokenizer, GPT2Tokenizer):
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.end_of_text)]
        fast = _of_bytes(tokens, merges_of_ranks(tokens))
        fast.add_special_tokens([END_OF_TEXT])
        return fast, END_OF_TEXT
    assert isinstance(tokenizer, SentencePieceTokenizer), tokenizer
    return _of_pieces(tokenizer)


def _of_bytes(
    tokens: list[bytes], merges: list[tuple[bytes, bytes]], one_word: bool = False
) -> Fast:
    """A byte-level BPE, of tokens that are strings of bytes."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): i for i, token in enumerate(tokens)}
    fast = Fast(models.BPE(vocabulary, [(spell(a), spell(b)) for a, b in merges]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not one_word)
    fast.decoder = decoders.ByteLevel()
    return fast


def merges_of_ranks(tokens: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    """The merges, first to last, behind a BPE whose tokens are given in the order of their ranks.

    Each token of several bytes was made of the two that the merges before its own leave of it.

    Examples:
        >>> merges_of_ranks([b"a", b"b", b"c", b"ab", b"abc"])
        [(b'a', b'b'), (b'ab', b'c')]
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token, rank in ranks.items():
        if len(token) < 2:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def _of_characters(characters: str) -> Fast:
    """One token per character; what the vocabulary lacks is an error, as it is in the project."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    vocabulary = {character: i for i, character in enumerate(characters)}
    fast = Fast(models.WordLevel(vocabulary, unk_token="\0unknown"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    return fast


def _of_pieces(tokenizer: SentencePieceTokenizer) -> tuple[Fast, str]:
    """A SentencePiece BPE with byte fallback, whose pieces have spaces where the model has marks.

    So a text needs no normalisation, and a literal mark, of which there is no piece, becomes bytes.
    A piece is made by whichever merge comes first, at the rank of its own score.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models

    processor = tokenizer._processor
    names = [processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    special = {
        i for i in range(len(names)) if processor.is_control(i) or processor.is_unknown(i)
    } | {i for i in range(len(names)) if processor.is_byte(i)}
    pieces = [n if i in special else n.replace(SPACE_MARK, " ") for i, n in enumerate(names)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for i, piece in enumerate(pieces)
        if i not in special
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    fast = Fast(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=False))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    end = names[tokenizer.end_of_text]
    fast.add_special_tokens([names[processor.unk_id()], end])
    return fast, end
