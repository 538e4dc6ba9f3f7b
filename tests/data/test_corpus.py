"""What a dataset name means; files, folders, the standard library; and errors in one line."""

import gzip
import hashlib
import json
import os
import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavelet_lm.config import DataConfig
from wavelet_lm.data.corpus import cut_by_position, path_corpus, stdlib_corpus
from wavelet_lm.data.dataset import prepare_data
from wavelet_lm.errors import UserError

SPLIT = (0.8, 0.1, 0.1)


def quiet(line):
    pass


def texts(corpus):
    """Split → its documents' texts, without the empty ones."""
    return {
        split: [text for document in documents() if (text := "".join(document))]
        for split, documents in corpus.splits.items()
    }


def prepare(dataset, tmp_path, log=quiet, **options):
    options = {"tokenizer": "bytes", "cache_dir": str(tmp_path / "cache"), **options}
    return prepare_data(DataConfig(dataset=str(dataset), **options), log=log)


def message(dataset, tmp_path, **options):
    """The one line of the error that preparing the dataset raises."""
    with pytest.raises(UserError) as error:
        prepare(dataset, tmp_path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [10, 999, 12_345])
def test_one_ascii_file_is_cut_at_exact_bytes(n, tmp_path):
    content = bytes(32 + i * i % 90 for i in range(n))
    file = tmp_path / "input.txt"
    file.write_bytes(content)
    data = prepare(file, tmp_path, split=(0.9, 0.1, 0))
    assert bytes(data.train.tokens) == content[: int(0.9 * n)]
    assert bytes(data.valid.tokens) == content[int(0.9 * n) :]
    assert data.test is None
    assert data.train.n_bytes == int(0.9 * n)
    assert data.name == tmp_path.name
    data = prepare(file, tmp_path, split=SPLIT)
    assert [len(s.tokens) for s in (data.train, data.valid)] == [
        int(0.8 * n),
        int(0.9 * n) - int(0.8 * n),
    ]
    assert bytes(data.train.tokens) + bytes(data.valid.tokens) + bytes(data.test.tokens) == content


@settings(deadline=None)
@given(
    documents=st.lists(st.lists(st.text("aé漢😀\n"))),
    first=st.floats(0.1, 0.8),
)
def test_cuts_lose_nothing_and_split_no_character(documents, first):
    corpus = cut_by_position(
        lambda: (iter(document) for document in documents), (first, 0.9 - first, 0.1)
    )
    whole = "".join("".join(document) for document in documents)
    parts = ["".join(p for doc in corpus[s]() for p in doc) for s in ("train", "valid", "test")]
    assert "".join(parts) == whole
    # A character belongs to the split in which its first byte lies.
    n, cut = len(whole.encode()), int(first * len(whole.encode()))
    starts = [len(whole[:i].encode()) for i in range(len(whole))]
    assert len(parts[0]) == sum(start < cut for start in starts)
    assert len(parts[2]) == sum(start >= int(0.9 * n) for start in starts)


def test_folder_is_concatenated_in_sorted_order(tmp_path):
    folder = tmp_path / "books"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("A" * 40)
    (folder / "b" / "c.md").write_text("C" * 40)
    (folder / "z.jsonl").write_text('{"text": "zz", "id": 1}\n\n{"text": ""}\n{"text": "yy"}\n')
    (folder / "picture.png").write_bytes(b"\xff")
    (folder / ".hidden.txt").write_text("no")
    with gzip.open(folder / "y.txt.gz", "wt") as file:
        file.write("Y" * 16)
    corpus = path_corpus(folder, (0.5, 0.3, 0.2), quiet)
    assert corpus.name == "books"
    assert texts(corpus) == {
        "train": ["A" * 40, "C" * 10],
        "valid": ["C" * 30],
        "test": ["Y" * 16, "zz", "yy"],
    }
    assert texts(corpus) == texts(corpus)  # readable again


@pytest.mark.parametrize("valid", ["valid", "val", "validation", "dev"])
def test_named_splits(valid, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.txt").write_text("one")
    (tmp_path / "train" / "2.md").write_text("two")
    (tmp_path / f"{valid}.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "MANIFEST.txt").write_text("not text")
    lines = []
    corpus = path_corpus(tmp_path, SPLIT, lines.append)
    assert texts(corpus) == {"train": ["one", "two"], "valid": ["three"]}
    named, left = lines
    assert f"train: train/1.txt, train/2.md; valid: {valid}.jsonl" in named
    assert "not used" in left
    assert "MANIFEST.txt" in left
    with gzip.open(tmp_path / "test.txt.gz", "wt") as file:
        file.write("four")
    assert texts(path_corpus(tmp_path, SPLIT, quiet))["test"] == ["four"]


def test_train_without_valid(tmp_path):
    (tmp_path / "train.txt").write_text("text")
    assert "no valid" in message(tmp_path, tmp_path)


def test_key_follows_the_content_and_the_split(tmp_path):
    keys = set()
    for name, text, split in [
        ("a.txt", "one", SPLIT),
        ("a.txt", "two", SPLIT),
        ("a.txt", "two", (0.9, 0.1, 0.0)),
        ("a.jsonl", "two", SPLIT),
    ]:
        (tmp_path / name).write_text(text)
        keys.add(path_corpus(tmp_path / name, split, quiet).key)
    assert len(keys) == 4
    (tmp_path / "b.txt").write_text("two")
    assert path_corpus(tmp_path / "b.txt", SPLIT, quiet).key in keys  # moved, not changed


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("tinyshakespeare/input.txt", "tinyshakespeare"),
        ("x/train.txt.gz", "x"),
        ("x/text.md", "x"),
        ("x/data.jsonl", "x"),
        ("x/poems.txt", "poems"),
        ("x/poems.jsonl.gz", "poems"),
    ],
)
def test_short_names(path, name, tmp_path):
    file = tmp_path / path
    file.parent.mkdir()
    file.write_bytes(gzip.compress(b"x", mtime=0) if path.endswith("gz") else b"x")
    assert path_corpus(file, SPLIT, quiet).name == name


def test_standard_library(tmp_path):
    lines = []
    corpus = stdlib_corpus(SPLIT, lines.append)
    found = texts(corpus)
    root = Path(sysconfig.get_path("stdlib"))
    everything = [text for part in found.values() for text in part]
    hashed = hashlib.sha256(b"json/decoder.py").digest()[:8]
    place = int.from_bytes(hashed, "big") / 2**64
    split = "train" if place < 0.8 else "valid" if place < 0.9 else "test"
    assert (root / "json" / "decoder.py").read_bytes().decode() in found[split]
    assert not any("import idle_test" in text for text in everything)
    assert len(lines) == 1
    for part, documents in found.items():
        size = sum(len(text.encode()) for text in documents)
        assert f"{part} {len(documents)} files, {size:,} bytes" in lines[0]
    sizes = [len("".join(documents)) for documents in found.values()]
    assert sizes[0] > 4 * sizes[1] > 0
    assert stdlib_corpus(SPLIT, quiet).key == corpus.key != stdlib_corpus((0.7, 0.3, 0), quiet).key


# --- the whole way -------------------------------------------------------------------------------


def test_prepare_twice_gives_the_same_without_reading_again(tmp_path):
    file = tmp_path / "poem.txt"
    file.write_text("Rosen, Tulpen, Nelken, alle drei verwelken.\n" * 200)
    for tokenizer in ("char", "bytes", "sentencepiece:290"):
        lines = []
        first = prepare(file, tmp_path, tokenizer=tokenizer, split=SPLIT)
        second = prepare(file, tmp_path, tokenizer=tokenizer, split=SPLIT, log=lines.append)
        assert first.name == "poem"
        assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
        assert first.tokenizer.name == tokenizer
        assert second.train.tokens.tolist() == first.train.tokens.tolist()
        parts = (second.train, second.valid, second.test)
        text = "".join(second.tokenizer.decode(part.tokens) for part in parts)
        assert text == file.read_text()
        assert [part.n_bytes for part in parts] == [
            len(second.tokenizer.decode(part.tokens)) for part in parts
        ]
        assert not any("training" in line for line in lines)


def test_char_vocabulary_spans_all_splits(tmp_path):
    file = tmp_path / "poem.txt"
    file.write_text("a" * 80 + "b" * 10 + "c" * 10)
    data = prepare(file, tmp_path, tokenizer="char", split=SPLIT)
    assert data.tokenizer.characters == "abc"
    other = tmp_path / "other.txt"
    other.write_text("a" * 50 + "x" * 50)
    config = DataConfig(dataset=str(other), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"'x' .* at position 50 "):
        prepare_data(config, tokenizer=data.tokenizer, log=quiet)


def test_a_given_tokenizer_wins(tmp_path, gpt2):
    file = tmp_path / "rows.jsonl"
    rows = [f"row number {i:02}" for i in range(100)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = DataConfig(
        dataset=str(file), tokenizer="char", split=SPLIT, cache_dir=str(tmp_path / "cache")
    )
    data = prepare_data(config, tokenizer=gpt2, log=quiet)
    assert data.tokenizer is gpt2
    assert data.train.tokens.dtype == "uint16"
    assert sum((data.train.tokens == gpt2.end_of_text).tolist()) == 79
    assert data.train.tokens[-1] != gpt2.end_of_text


# --- errors --------------------------------------------------------------------------------------


def test_missing_paths(tmp_path):
    for missing in ("./nothing", "~/nothing-here", "/no/such/file", "poems.txt", "a/b/c", "x y"):
        assert "missing data path" in message(missing, tmp_path)
    assert "docs/getting-started.md" in message("data/nothing-here", tmp_path)
    assert "getting-started" not in message("./nothing", tmp_path)
    assert "did you mean wikitext-103?" in message("wikitext103", tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n", b"x"])
def test_too_little_text(content, tmp_path):
    file = tmp_path / "empty.txt"
    file.write_bytes(content)
    assert "split has no text" in message(file, tmp_path)
    assert "no text" in message(file, tmp_path, tokenizer="char")
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_empty_named_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for split, text in (("train", "text"), ("valid", "text"), ("test", "")):
        (tmp_path / "data" / f"{split}.txt").write_text(text)
    lines = []
    assert prepare(tmp_path / "data", tmp_path, log=lines.append).test is None
    assert any("test split has no text" in line for line in lines)
    (tmp_path / "data" / "valid.txt").write_text("")
    assert "the valid split has no text" in message(tmp_path / "data", tmp_path)


def test_unsupported(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"x")
    assert ".jsonl" in message(tmp_path / "picture.png", tmp_path)
    assert "no text files" in message(tmp_path, tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"ok\nok\n\xff", "byte 6, line 3"),
        ("é\n".encode() * 700_000 + b"a\xc3(", "byte 2100001, line 700001"),  # beyond a piece
        (b"cut short \xe6\xbc", "byte 10, line 1"),
    ],
)
def test_invalid_utf8_says_where(packed, content, place, tmp_path):
    file = tmp_path / ("text.txt.gz" if packed else "text.txt")
    file.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    assert place in message(file, tmp_path)
    assert str(file) in message(file, tmp_path)


@pytest.mark.parametrize(
    "damaged",
    [
        b"not gzip at all",
        gzip.compress(b"text" * 1000, mtime=0)[:-12],
        gzip.compress(random.Random(0).randbytes(5000), mtime=0)[:100] + b"\0" * 50,
    ],
)
def test_broken_gzip(damaged, tmp_path):
    file = tmp_path / "text.txt.gz"
    file.write_bytes(damaged)
    assert "broken gzip" in message(file, tmp_path)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (b"{oops}", "not a JSON row"),
        (b'"text"', "no text"),
        (b'{"txt": "x"}', "no text"),
        (b'{"text": 3}', "no text"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "not a JSON row"),
    ],
)
def test_bad_rows(row, complaint, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + row + b"\n")
    found = message(file, tmp_path)
    assert complaint in found
    assert f"{file}, line 3" in found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    file = tmp_path / "secret.txt"
    file.write_text("text")
    file.chmod(0)
    assert "cannot be read" in message(file, tmp_path)


def test_names_are_checked_before_any_work(tmp_path):
    assert "unknown tokenizer 'gpt5'" in message("/no/such/file", tmp_path, tokenizer="gpt5")
