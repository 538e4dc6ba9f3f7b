"""Piecewise encoding against whole encoding, token files, caching, locking and full disks."""

import errno
import json
import multiprocessing
import re
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import make_tokenizer, some_text, tokenizer_or_skip
from wavelet_lm.data import encoding
from wavelet_lm.data.encoding import (
    EmptySplitError,
    encode_documents,
    locked,
    safe_pieces,
    sample_blocks,
    token_file,
)
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.errors import UserError

ALL = ["bytes", "char", "sentencepiece", "gpt2"]
SPACED_TEXT = st.text(st.sampled_from(" \n\t\r▁ab'ts.7\u3000\u00a0\x1c\x85"), max_size=60)


def quiet(line):
    pass


@pytest.mark.parametrize("name", ["sentencepiece", "gpt2"])
@settings(max_examples=300, deadline=None)
@given(text=SPACED_TEXT, cuts=st.lists(st.integers(0, 60)), size=st.integers(1, 20))
def test_pieces_encode_like_the_whole(name, text, cuts, size):
    tokenizer = tokenizer_or_skip(name)
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    stream = [text[a:b] for a, b in pairwise(edges)]
    pieces = list(safe_pieces(iter(stream), size))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(
        text
    )


def test_no_sentencepiece_piece_has_a_safe_cut_inside():
    tokenizer = make_tokenizer("sentencepiece")
    pieces = [tokenizer.token_bytes(token).decode("latin-1") for token in range(400)]
    assert any(re.fullmatch(" +[a-z]+", piece) for piece in pieces)
    assert [piece for piece in pieces if re.search(r"[^ ] |.\n|\n.", piece)] == []


@pytest.mark.parametrize("name", ["sentencepiece", "gpt2"])
def test_a_long_text_in_real_pieces(name):
    tokenizer = tokenizer_or_skip(name)
    text = some_text(60_000)
    assert len(list(safe_pieces(iter([text])))) > 3
    # As a second document, so that the end of text must not appear between its pieces.
    (tokens, n_bytes), *rest = encode_documents(iter([iter(["x"]), iter([text])]), tokenizer)
    assert not rest
    assert tokens.tolist() == [
        *tokenizer.encode("x"),
        tokenizer.end_of_text,
        *tokenizer.encode(text),
    ]
    assert n_bytes == 1 + len(text.encode())


def test_pieces_are_bounded(monkeypatch):
    pieces = [len(p) for p in safe_pieces(iter(["ab " * 10_000]), 100)]
    assert max(pieces) <= 100 + 3
    assert min(pieces[:-1]) > 90
    monkeypatch.setattr(encoding, "LONGEST_UNCUT_CHARS", 1000)
    pieces = list(safe_pieces(iter(["x" * 2500]), 100))
    assert "".join(pieces) == "x" * 2500
    assert max(map(len, pieces)) == 1000


@pytest.mark.parametrize("name", ALL)
def test_end_of_text_stands_between_documents(name, monkeypatch):
    tokenizer = tokenizer_or_skip(name)
    monkeypatch.setattr(encoding, "BATCH_CHARS", 7)  # batches end inside and between documents
    texts = ["the text", "", "of a wavelet looks back", "x\n", "the", "text"]
    documents = iter([iter([]), *(iter([text]) for text in texts)])
    stretches = list(encode_documents(documents, tokenizer))
    expected, n_breaks = [], 0
    for before, text in pairwise(["", *filter(None, texts)]):
        if before and tokenizer.end_of_text is not None:
            expected.append(tokenizer.end_of_text)
        elif before and not before.endswith("\n"):  # a line break, which is text and counts
            expected += tokenizer.encode("\n")
            n_breaks += 1
        expected += tokenizer.encode(text)
    assert np.concatenate([tokens for tokens, _ in stretches]).tolist() == expected
    assert sum(n for _, n in stretches) == len("".join(texts).encode()) + n_breaks


def test_position_of_an_unknown_character(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARS", 5)
    documents = iter([iter(["text " * 10, "the @"])])
    with pytest.raises(UserError, match=r"'@' .* at position 54 "):
        list(encode_documents(documents, make_tokenizer("char")))


class Documents:
    """Documents that count how often they are read."""

    def __init__(self, *texts):
        self.texts, self.reads = texts, 0

    def __call__(self):
        self.reads += 1
        return (iter([text]) for text in self.texts)


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_smallest_type(vocab, dtype, tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab
    encoded = token_file(tmp_path / "train.bin", Documents("\0\1"), tokenizer, quiet)
    assert encoded.tokens.dtype == dtype
    assert encoded.tokens.tolist() == [0, 1]


def test_file_is_reused_and_rebuilt_when_not_whole(tmp_path):
    documents, path = Documents("some text"), tmp_path / "deep" / "train.bin"
    for _ in range(2):
        encoded = token_file(path, documents, ByteTokenizer(), quiet)
        assert bytes(encoded.tokens) == b"some text"
        assert encoded.n_bytes == 9
    assert documents.reads == 1
    counts = path.with_suffix(".json")
    for damage in (
        lambda: path.write_bytes(b"some"),
        lambda: path.unlink(),
        lambda: counts.unlink(),
        lambda: counts.write_text("{"),
        lambda: counts.write_text(json.dumps({"tokens": 3, "bytes": 9})),
    ):
        del encoded
        damage()
        reads = documents.reads
        encoded = token_file(path, documents, ByteTokenizer(), quiet)
        assert bytes(encoded.tokens) == b"some text"
        assert documents.reads == reads + 1


def leftovers(folder):
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]


def test_nothing_stays_of_a_failure(tmp_path):
    def broken():
        yield iter(["text " * 300_000])
        raise UserError("row 7 is broken")

    with pytest.raises(UserError, match="row 7"):
        token_file(tmp_path / "train.bin", broken, ByteTokenizer(), quiet)
    with pytest.raises(EmptySplitError, match="the valid split has no text"):
        token_file(tmp_path / "valid.bin", Documents("", ""), ByteTokenizer(), quiet)
    assert leftovers(tmp_path) == ["valid.json"]  # which says so the next time


def test_a_split_that_is_known_to_be_empty_needs_no_lock(tmp_path, monkeypatch):
    def encode():
        return token_file(tmp_path / "test.bin", Documents(""), ByteTokenizer(), quiet)

    with pytest.raises(EmptySplitError):
        encode()
    monkeypatch.setattr(encoding, "locked", lambda *args: pytest.fail("asked for a lock"))
    with pytest.raises(EmptySplitError, match="the test split has no text"):
        encode()


def test_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".train.bin.123.tmp").write_bytes(b"half")
    token_file(tmp_path / "train.bin", Documents("whole"), ByteTokenizer(), quiet)
    assert sorted(leftovers(tmp_path)) == ["train.bin", "train.json"]


def test_full_disk(tmp_path, monkeypatch):
    real_open = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, data):
            self.file.write(data[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

    def full_open(path, mode="r", *args, **kwargs):
        file = real_open(path, mode, *args, **kwargs)
        return Full(file) if mode == "wb" and path.name.endswith(".tmp") else file

    monkeypatch.setattr(Path, "open", full_open)
    with pytest.raises(UserError, match="disk is full") as error:
        token_file(tmp_path / "train.bin", Documents("text"), ByteTokenizer(), quiet)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert leftovers(tmp_path) == []


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        token_file(tmp_path / "file" / "train.bin", Documents("x"), ByteTokenizer(), quiet)


def _encode_in_a_process(path, barrier, reads):
    documents = Documents(some_text(20_000))
    barrier.wait()
    encoded = token_file(path, documents, ByteTokenizer(), quiet)
    reads.put((documents.reads, len(encoded.tokens)))


def test_two_processes_encode_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, reads = context.Barrier(2), context.Queue()
    arguments = (tmp_path / "train.bin", barrier, reads)
    processes = [context.Process(target=_encode_in_a_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    results = [reads.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(n for n, _ in results) == [0, 1]
    assert {n for _, n in results} == {len(some_text(20_000).encode())}


def test_the_second_says_that_it_waits(tmp_path):
    path = tmp_path / "train.bin"
    held, waits, lines = threading.Event(), threading.Event(), []

    def hold():
        with locked(path, quiet):
            held.set()
            waits.wait(60)
            path.write_bytes(b"done")
            path.with_suffix(".json").write_text('{"tokens": 4, "bytes": 4}')

    def log(line):
        lines.append(line)
        waits.set()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    documents = Documents("other")
    encoded = token_file(path, documents, ByteTokenizer(), log)
    holder.join()
    assert bytes(encoded.tokens) == b"done"
    assert documents.reads == 0
    assert len(lines) == 1
    assert "waiting" in lines[0]


def test_sample_is_all_or_evenly_spread():
    texts = [f"{i} " * 3000 for i in range(200)]
    assert "".join(sample_blocks(Documents(*texts)(), 10**9)).split() == " ".join(texts).split()
    limit = 300_000
    sample = sample_blocks(Documents(*texts)(), limit)
    assert limit / 2 < sum(map(len, sample)) <= 1.2 * limit
    seen = sorted({int(number) for number in " ".join(sample).split()})
    assert seen[0] < 20
    assert seen[-1] > 150
