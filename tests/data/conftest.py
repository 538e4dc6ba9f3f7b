"""Tokenizers for the tests, the GPT-2 one only where its vocabulary is at hand."""

import functools
import random
from unittest import mock

import pytest
import requests

from wavelet_lm.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    train_sentencepiece,
)
from wavelet_lm.errors import UserError

WORDS = ["the", "wavelet", "of", "a", "text", "looks", "", "back\tover", "levels;", "naïve", "漢字"]
WORDS += ["def", "f(x):", "", "", "", "", "return", "x12"]


def some_text(n_words: int, seed: int = 0) -> str:
    """Words with all sorts of whitespace between and around them."""
    generator = random.Random(seed)
    gaps = [" "] * 20 + ["\n", "\n\n", "  ", "    ", "\t", "\r\n", "\u3000", " \n ", "\u00a0"]
    return "".join(generator.choice(WORDS) + generator.choice(gaps) for _ in range(n_words))


@functools.cache
def gpt2_or_none():
    # tiktoken downloads without a time limit; no test waits for a network that is not there.
    hasty = functools.partial(requests.get, timeout=5)
    try:
        with mock.patch("requests.get", hasty):
            return GPT2Tokenizer()
    except UserError:
        return None


@functools.cache
def make_tokenizer(name: str):
    if name == "bytes":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.of([some_text(2000), "▁\0\ufeff"])
    if name == "sentencepiece":
        return train_sentencepiece(iter(some_text(5000).split("\n")), 400)
    return gpt2_or_none()


def tokenizer_or_skip(name: str):
    tokenizer = make_tokenizer(name)
    if tokenizer is None:
        pytest.skip("the GPT-2 vocabulary is neither cached nor reachable")
    return tokenizer


@pytest.fixture
def gpt2():
    return tokenizer_or_skip("gpt2")
