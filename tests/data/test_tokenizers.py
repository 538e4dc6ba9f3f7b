"""Losslessness, byte accounting, saving and errors of the four tokenizers."""

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data.conftest import make_tokenizer, some_text, tokenizer_or_skip
from wavelet_lm.data import tokenizers
from wavelet_lm.data.tokenizers import (
    CharTokenizer,
    GPT2Tokenizer,
    check_tokenizer_name,
    load_tokenizer,
    train_sentencepiece,
)
from wavelet_lm.errors import UserError

ALL = ["bytes", "char", "sentencepiece", "gpt2"]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SPACED_TEXT = st.text(st.sampled_from(" \n\t\r▁ab.\0\u3000<>/s"))


def check_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "gpt2"])
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT | SPACED_TEXT)
@example(text="▁ ▁▁  a▁b\0</s><unk><0x41><|endoftext|>\ufeff\ufffd\U0010ffff")
def test_any_text_survives(name, text):
    check_lossless(tokenizer_or_skip(name), text)


def test_char_text_survives():
    check_lossless(make_tokenizer("char"), some_text(500, seed=1) + "▁\0\ufeff")


@pytest.mark.parametrize("name", ALL)
def test_batch_is_one_by_one(name):
    tokenizer = tokenizer_or_skip(name)
    texts = [some_text(50, seed) for seed in range(5)] + ["", "▁"]
    if name == "char":
        texts.pop()
        texts.append("\0")
    assert [list(ids) for ids in tokenizer.encode_batch(texts)] == list(
        map(tokenizer.encode, texts)
    )


@pytest.mark.parametrize("name", ALL)
def test_end_of_text_is_never_encoded(name):
    tokenizer = tokenizer_or_skip(name)
    if name in ("bytes", "char"):
        assert tokenizer.end_of_text is None
        return
    assert tokenizer.token_bytes(tokenizer.end_of_text) == b""
    assert tokenizer.end_of_text not in tokenizer.encode("</s><|endoftext|>")
    assert tokenizer.decode([tokenizer.end_of_text]) == ""


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("place", ["", "tokenizer", "best.safetensors"])
def test_saved_and_loaded(name, place, tmp_path):
    tokenizer = tokenizer_or_skip(name)
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "best.safetensors").touch()
    again = load_tokenizer(tmp_path / place)
    text = some_text(100, seed=3)
    assert (again.name, again.vocab_size, again.end_of_text, again.fingerprint) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
        tokenizer.fingerprint,
    )
    assert again.encode(text) == tokenizer.encode(text)


def test_gpt2_is_tiktokens(gpt2):
    text = some_text(300) + "<|endoftext|>"
    assert gpt2.encode(text) == tiktoken.get_encoding("gpt2").encode(text, disallowed_special=())
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert [gpt2.decode([i]) for i in (50256, 0)] == ["", "!"]


def test_gpt2_without_vocabulary(monkeypatch):
    def unreachable():
        raise OSError("no network\nat all")

    monkeypatch.setattr("tiktoken_ext.openai_public.gpt2", unreachable)
    tokenizers._gpt2_encoding.cache_clear()
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as error:
        GPT2Tokenizer()
    assert "\n" not in str(error.value)


def test_sentencepiece_learns_runs_of_spaces():
    tokenizer = train_sentencepiece(iter(["def f():", "        return x"] * 200), 290)
    assert len(tokenizer.encode(" " * 8)) < 8
    assert tokenizer.name == "sentencepiece:290"
    # Training is a function of the text alone.
    again = train_sentencepiece(iter(["def f():", "        return x"] * 200), 290)
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("sentences", "vocab", "message"),
    [
        (["hello world"] * 3, 5000, r"largest possible is sentencepiece:(\d+)"),
        (["hello world"] * 3, 20, r"smallest possible is sentencepiece:(\d+)"),
        ([], 300, "no text"),
    ],
)
def test_impossible_vocabularies(sentences, vocab, message):
    with pytest.raises(UserError, match=message) as error:
        train_sentencepiece(iter(sentences), vocab)
    words = str(error.value).split("is sentencepiece:")
    if len(words) == 2:  # the size that the message names does work
        assert train_sentencepiece(iter(sentences), int(words[1])).vocab_size == int(words[1])


def test_unknown_character_is_named():
    with pytest.raises(UserError, match=r"'z' \(U\+007A\) at position 3 "):
        CharTokenizer("ab").encode("abaz")
    with pytest.raises(UserError, match="at position 13 "):
        CharTokenizer("ab").encode_batch(["ab", "az"], start=10)


def test_char_vocabulary_is_sorted():
    tokenizer = CharTokenizer.of(["ba", "\U0001f600a\uffff"])
    assert tokenizer.characters == "ab\uffff\U0001f600"
    assert tokenizer.encode("\U0001f600b") == [3, 1]


@pytest.mark.parametrize("name", ["gpt3", "sentencepiece", "sentencepiece:", "sentencepiece:x", ""])
def test_unknown_names(name):
    with pytest.raises(UserError):
        check_tokenizer_name(name)


def test_load_errors(tmp_path):
    with pytest.raises(UserError, match="no such run"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    for broken in ("{", "[]", "{}", '{"name": 3}', '{"name": "sentencepiece:300"}', '{"name":"x"}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(UserError):
            load_tokenizer(tmp_path)
    for broken, line in (
        ("[]", r"\[\] says no tokenizer; there must be an object with a name"),
        ('{"name": 3}', "{'name': 3} says no tokenizer"),
        ('{"name": "char"}', "its characters are None, not a text"),
        ('{"name": "mulaw", "colour": 1}', "has other keys than a tokenizer 'mulaw'"),
        ('{"name": "sentencepiece:300"}', "sentencepiece.model: cannot be read"),
        ('{"name": "encodec:x"}', r"tokenizer\.json: tokenizer 'encodec:x': write encodec:N"),
        ('{"name": "pixels"}', r"tokenizer\.json: .* does not say what its files have in common"),
        ('{"name": "pixels", "width": 3}', r"tokenizer\.json: .* have in common"),
        *(
            (
                f'{{"name": "pixels_rgb", "width": {side}, "height": 2}}',
                r"tokenizer\.json: .* width",
            )
            for side in ("0", "-3", "2.5", "true", '"8"', "[8]", "9e99", "1" * 300)
        ),
    ):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(UserError, match=line):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"name": "sentencepiece:300"}')
    (tmp_path / "sentencepiece.model").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
