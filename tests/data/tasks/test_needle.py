"""Sentences are found whole, and come again where they should."""

import numpy as np
import pytest

from wavelet_lm.data.tasks.needle import SHORTEST, find_needles
from wavelet_lm.data.tokenizers import ByteTokenizer, CharTokenizer, train_sentencepiece
from wavelet_lm.errors import UserError

SENTENCES = [
    "The first of them is short enough.",
    "“Is the second one a question (perhaps)?”",
    "Été comme hiver, on lit des phrases!",
    "Too short.",
    "A heading of a fitting length",
    "And this one, which goes on and on and on until nobody remembers its beginning, is long.",
]
TEXT = "".join(s + ("\n\n" if s[-1].isalpha() else " ") for s in SENTENCES) * 30


def tokens_of(tokenizer):
    return np.array(tokenizer.encode(TEXT), dtype=np.uint16)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer.of([TEXT])])
def test_whole_sentences_of_a_fitting_length(tokenizer):
    tokens = tokens_of(tokenizer)
    needles = find_needles(tokens, tokenizer.token_bytes, 40, lead=50, distances=[60, 500])
    found = [tokenizer.decode(tokens[n.start : n.end]) for n in needles]
    assert set(found) == set(SENTENCES[:3])
    assert len(set(needles)) == len(needles) > 20
    assert all(SHORTEST <= n.end - n.start <= 60 for n in needles)
    assert all(50 <= n.start and n.start + 500 <= len(tokens) for n in needles)
    # From the beginning to the end of the text.
    assert needles[0].start < 300
    assert needles[-1].start > len(tokens) - 900


def test_pieces_that_hold_the_space_before_a_word():
    words = "Here is a sentence of the kind that has more than sixteen tokens in all. "
    tokenizer = train_sentencepiece(iter([words * 9]), 330)
    tokens = np.array(tokenizer.encode(words * 30))
    assert tokenizer.token_bytes(int(tokens[4])).startswith(b" ")
    needles = find_needles(tokens, tokenizer.token_bytes, 5, lead=10, distances=[40])
    assert {tokenizer.decode(tokens[n.start : n.end]) for n in needles} == {" " + words.strip()}


def test_a_sentence_comes_again_at_its_distance():
    tokens = tokens_of(ByteTokenizer())
    for distance in (60, 333):
        for needle in find_needles(
            tokens, ByteTokenizer().token_bytes, 9, lead=20, distances=[60, 333]
        ):
            text, control = needle.texts(tokens, 20, distance)
            n = needle.end - needle.start
            sentence = tokens[needle.start : needle.end]
            assert len(text) == 20 + distance + n
            assert len(control) == 20 + distance
            assert text[20 : 20 + n].tolist() == text[20 + distance :].tolist() == sentence.tolist()
            assert control[distance + 20 - n :].tolist() == sentence.tolist()
            # But for the sentence again, the one is the text and the other lacks the sentence.
            start = needle.start - 20
            assert text[: 20 + distance].tolist() == tokens[start : start + 20 + distance].tolist()
            assert control[:20].tolist() == text[:20].tolist()
            assert control[20 : 20 + distance - n].tolist() == text[20 + n : 20 + distance].tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It ends. " * 40, "no sentence of 16 to 100 tokens with 50 tokens before it and 100"),
        ("no full stop " * 40, "no sentence of 16 to 100 tokens"),
        ("A text of one sentence.", "has 23 tokens, and a distance of 100 needs 151"),
    ],
)
def test_a_text_without_such_sentences(text, words):
    tokenizer = ByteTokenizer()
    tokens = np.array(tokenizer.encode(text), dtype=np.uint8)
    with pytest.raises(UserError, match=words):
        find_needles(tokens, tokenizer.token_bytes, 5, lead=50, distances=[100])
