"""The fast tokenizers encode and decode as the project's do, for any text."""

import os
import random

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.conftest import ROOT  # noqa: E402
from wavelet_lm.data.modalities import find_modality  # noqa: E402
from wavelet_lm.data.tokenizers import (  # noqa: E402
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    train_sentencepiece,
)
from wavelet_lm.errors import UserError  # noqa: E402
from wavelet_lm.interop.transformers_tokenizer import (  # noqa: E402
    fast_tokenizer,
    merges_of_ranks,
    pad_token_id,
)

SOURCE = (ROOT / "wavelet_lm" / "data" / "tokenizers.py").read_text(encoding="utf-8")
ODD = (
    "né ▁ x▁▁y  \n\n\t 12345 <|endoftext|></s><unk> ▅ Ā <|padding|> <0x41> 日本語 🎉 a\r\nb \0\x01"
)


def tokenizers():
    yield ByteTokenizer()
    yield CharTokenizer.of([SOURCE, ODD, "  \n\tabcdef()123▁é日_.:"])
    yield train_sentencepiece(iter(SOURCE.splitlines()), 600)
    try:
        yield GPT2Tokenizer()
    except UserError:  # its vocabulary is not here
        return


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each tokenizer of the project, and the fast one as it comes back from its folder."""
    found = []
    for tokenizer in tokenizers():
        folder = tmp_path_factory.mktemp("tokenizer")
        fast_tokenizer(tokenizer).save_pretrained(folder)
        found.append((tokenizer, transformers.AutoTokenizer.from_pretrained(folder)))
    return found


def assert_same(pairs, text):
    for tokenizer, fast in pairs:
        tokens = tokenizer.encode(text)
        assert fast(text)["input_ids"] == tokens, tokenizer.name
        assert fast.decode(tokens) == text, tokenizer.name


def test_odd_texts_and_long_ones(pairs):
    words, rng = SOURCE.split(" "), random.Random(0)
    shuffled = " ".join(rng.choices(words, k=500))
    for text in (SOURCE, ODD, shuffled, "", " ", "  a", "\n"):
        assert_same(pairs, text)


@settings(max_examples=150, suppress_health_check=list(HealthCheck), derandomize=True)
@given(text=st.text("  \n\tabcdefself()123▁é日_.:", max_size=40))
def test_random_texts(pairs, text):
    assert_same(pairs, text)


def test_padding_is_no_token_of_a_text(pairs):
    for tokenizer, fast in pairs:
        assert fast.is_fast and fast.padding_side == "left"
        assert fast.pad_token_id == pad_token_id(tokenizer)
        short = fast(["ab", "abcabc def"], padding=True)
        assert short["input_ids"][0][0] == fast.pad_token_id
        ends = tokenizer.end_of_text
        assert fast.eos_token_id == ends
        assert len(fast) == tokenizer.vocab_size + (ends is None)


def test_a_character_that_is_unknown_is_an_error():
    with pytest.raises(Exception, match="Missing"):
        fast_tokenizer(CharTokenizer("abc"))("abd")


def test_tokens_that_are_no_text_have_none():
    assert fast_tokenizer(find_modality("pixels")) is None


def test_merges_are_read_off_ranks():
    tokens = [b"a", b"b", b"c", b"bc", b"ab", b"abc"]
    assert merges_of_ranks(tokens)[-1] == (b"a", b"bc")
