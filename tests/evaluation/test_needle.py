"""The needle: an oracle finds it wherever it is, a model without memory nowhere."""

import math
import random

import numpy as np
import pytest
import torch

from tests.evaluation.readers import Reader, sure_of
from wavelet_lm.data.tasks.needle import CUE, find_needles
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.errors import UserError
from wavelet_lm.evaluation import needle

VOCAB = 256


@pytest.fixture(scope="module")
def book():
    draws = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draws.choices(letters, k=draws.randint(2, 9))) for _ in range(800)]
    stops = (word + (". " if i % 5 == 4 else " ") for i, word in enumerate(words))
    return np.frombuffer("".join(stops).encode(), np.uint8)


def evaluated(book, says, distances=(64, 200), **options):
    found = find_needles(book, ByteTokenizer().token_bytes, 4, lead=30, distances=distances)
    model = Reader(says)
    return found, needle.evaluate(model, book, found, lead=30, distances=distances, **options)


def after_the_same(text, memory=10_000):
    """What came where the last six tokens stood before, if that was within the memory."""
    past = bytes(text[-memory:])
    place = past.rfind(past[-6:], 0, len(past) - 1)
    return past[place + 6] if place >= 0 else None


def test_an_oracle_finds_what_it_has_seen(book):
    n_read = []
    found, rows = evaluated(
        book, lambda text: sure_of(after_the_same(text), VOCAB), progress=n_read.append
    )
    n_scored = sum(n.end - n.start - CUE for n in found)
    assert [row["distance"] for row in rows] == [64, 200]
    for row in rows:
        assert (row["needles"], row["tokens"]) == (4, n_scored)
        assert row["again"]["accuracy"] == row["window"] == 1
        assert row["again"]["nats"] < 1e-5
        for unknown in ("first", "unseen"):
            assert row[unknown]["accuracy"] < 0.1
            assert row[unknown]["nats"] == pytest.approx(math.log(VOCAB), rel=0.1)
    lengths = [n.end - n.start for n in found]
    assert n_read == [2 * 30 + 2 * d + length for d in (64, 200) for length in lengths]


def test_a_shorter_memory_than_the_distance_finds_nothing(book):
    """Six tokens that stand 64 before and are followed by one: 70 tokens of memory."""
    _, (near, far) = evaluated(book, lambda text: sure_of(after_the_same(text, 70), VOCAB))
    assert near["again"]["accuracy"] == 1
    assert far["again"] == far["unseen"]


def test_long_texts_are_streamed_alone(book, monkeypatch):
    monkeypatch.setattr(needle, "WINDOW", 200)
    monkeypatch.setattr(needle, "CHUNK", 17)
    _, (near, far) = evaluated(book, lambda text: sure_of(after_the_same(text), VOCAB))
    assert near["window"] == near["again"]["accuracy"] == far["again"]["accuracy"] == 1
    assert far["window"] is None


def test_output_that_is_not_finite_is_refused(book):
    with pytest.raises(UserError, match="not finite"):
        evaluated(book, lambda text: torch.full((VOCAB,), math.nan))


@pytest.mark.parametrize(
    ("given", "block_size", "longest", "expected"),
    [
        (None, 128, None, ([32, 64, 128, 256, 512, 1024], 64)),
        (None, 128, 128, ([32, 64], 32)),
        ([20, 4000], 16, None, ([20, 4000], 8)),
        ([30], 100, 100, ([30], 40)),
        ([30, 69], 100, 100, ([30, 69], 1)),
    ],
)
def test_distances_that_fit_and_what_stands_before(given, block_size, longest, expected):
    assert needle._fitting(given, block_size, longest) == expected


@pytest.mark.parametrize(
    ("given", "block_size", "longest", "words"),
    [
        ([30, 70], 100, 100, "reads 100 tokens at most, and --distances up to 70 need 101"),
        ([15], 100, None, "a distance is 15; it must be 16 or more"),
        (None, 16, 16, "trained on 16 tokens at once, too few"),
    ],
)
def test_distances_that_do_not_fit(given, block_size, longest, words):
    with pytest.raises(UserError, match=words):
        needle._fitting(given, block_size, longest)
