"""Which files of a folder are the data, which split each is, and what is refused."""

import gzip
import os
from pathlib import Path

import pytest

from wavelet_lm import Config, UserError
from wavelet_lm.data import dataset
from wavelet_lm.data.corpus import TextFiles, separated
from wavelet_lm.data.dataset import cache_folder, open_corpus, prepare_data, prepare_split
from wavelet_lm.data.files import ALL, files_by_split, find_files, walk
from wavelet_lm.data.tokenizers import ByteTokenizer

QUIET = lambda line: None  # noqa: E731


def make(folder, *names, text="some text"):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".gz"):
            file.write_bytes(gzip.compress(text.encode()))
        else:
            file.write_text(f'{{"text": "{text}"}}\n' if ".jsonl" in name else text)
    return folder


def splits(folder, log=QUIET, **options):
    found = files_by_split(folder, TextFiles, log, **options)
    return {s: [f.relative_to(folder).as_posix() for f in files] for s, files in found.items()}


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        (["wiki.train.txt"], ["wiki.valid.txt"], ["wiki.test.txt"]),
        (
            ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            ["validation-00000-of-00001.jsonl"],
            ["test-00000-of-00001.jsonl"],
        ),
        (["TRAINING.txt"], ["my_dev_set.md"], ["held-out.txt"]),
        (["en/train.txt", "fr/train.txt"], ["en/val.txt", "fr/val.txt"], ["en/eval.txt"]),
        (["train/a.txt", "train/about_test.txt"], ["valid/b.txt.gz"], ["test/c.txt"]),
        (["train_set/w.train.txt"], ["train_set/w.valid.txt"], ["train_set/w.test.txt"]),
        (["train_test/train.txt"], ["train_test/val.txt"], ["train_test/test.txt"]),
        (["train.txt"], ["valid.txt"], ["test-00000-of-00001.jsonl"]),
        (["trainSet.txt"], ["validating.txt"], ["wiki.holdout.txt"]),
    ],
)
def test_splits_in_every_style(train, valid, test, tmp_path):
    make(tmp_path, *train, *valid, *test)
    lines = []
    assert splits(tmp_path, lines.append) == {"train": train, "valid": valid, "test": test}
    assert all(name in lines[0] for name in (*train, *valid, *test))


def test_no_held_out_line_is_trained_on(tmp_path):
    folder = tmp_path / "wiki"
    make(folder, "wiki.train.txt", text="train " * 20)
    make(folder, "wiki.valid.txt", text="valid " * 20)
    make(folder, "wiki.test.txt", text="test " * 20)
    config = Config(dataset=str(folder), tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    data = prepare_data(config, log=QUIET)
    assert data.train.tokens.tobytes() == b"train " * 20
    assert data.valid.tokens.tobytes() == b"valid " * 20
    assert data.test.tokens.tobytes() == b"test " * 20


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.txt", "b.txt", "test.txt"], ["test.txt", "no train"]),
        (["wiki.train.txt", "wiki.test.txt"], ["wiki.train.txt", "no valid"]),
        (["train.txt", "valid.txt", "val.txt"], ["val.txt", "valid.txt", "which is it?"]),
        (["a.train.txt", "a.valid.txt", "train_test.txt"], ["train_test.txt", "one or none"]),
        (["book.txt", "book.txt.gz"], ["book.txt", "book.txt.gz", "twice"]),
        (["train_corpus/test/a.txt", "README.md"], ["train_corpus/test/a.txt", "one or none"]),
        (["book.md.GZ", "book.md.gz"], ["book.md.gz", "book.md.GZ", "twice"]),
    ],
)
def test_names_that_leave_a_choice_are_refused(names, words, tmp_path):
    with pytest.raises(UserError) as error:
        splits(make(tmp_path, *names))
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        ["a.txt", "b.md"],
        ["on training.txt", "other.txt"],
        ["contest.txt", "developer.md", "evaluate.txt"],
        ["a.txt", "prétest.txt"],
    ],
)
def test_names_that_say_no_split_are_one_text(names, tmp_path):
    assert splits(make(tmp_path, *names)) == {ALL: sorted(names)}


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder, other = tmp_path / "data", make(tmp_path / "other", "c.txt", "deep/d.txt")
    make(folder, "a.txt", ".hidden.txt")
    (folder / "linked").symlink_to(other)
    (folder / "file.txt").symlink_to(make(tmp_path / "third", "e.txt") / "e.txt")
    (other / "deep" / "up").symlink_to(folder)
    names = [file.relative_to(folder).as_posix() for file in find_files(folder, TextFiles)]
    assert names == ["a.txt", "file.txt", "linked/c.txt", "linked/deep/d.txt"]


def test_a_folder_that_is_there_twice_is_named(tmp_path):
    make(tmp_path, "train/a.txt")
    (tmp_path / "valid").symlink_to("train")
    with pytest.raises(UserError, match=r"valid and .*train are one folder"):
        splits(tmp_path)


def test_what_is_no_file_is_named(tmp_path):
    make(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(UserError, match=r"b\.txt: neither a file nor a folder"):
        splits(tmp_path)


def test_a_link_to_itself_is_named(tmp_path):
    (tmp_path / "l.txt").symlink_to("l.txt")
    with pytest.raises(UserError, match=r"l\.txt: cannot be read \(Too many levels"):
        splits(tmp_path)


def test_what_cannot_be_looked_at_is_named(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "locked/b.txt")
    real = Path.stat

    def refuse(path, **options):
        if path.name == "locked":  # as in a folder that may be listed but not entered
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(UserError, match=r"locked: cannot be read \(Permission denied\)"):
        list(walk(tmp_path))


def test_a_file_that_is_there_twice_is_named(tmp_path):
    make(tmp_path, "train.txt")
    (tmp_path / "valid.txt").symlink_to(tmp_path / "train.txt")
    with pytest.raises(UserError, match=r"train\.txt and valid\.txt are one file"):
        splits(tmp_path)


def test_a_dead_link_is_named(tmp_path):
    make(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"b\.txt: a link to nowhere, which is not there"):
        splits(tmp_path)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "locked/b.txt")
    real = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"locked: cannot be read \(Permission denied\)"):
        list(walk(tmp_path))


def config_for(tmp_path, **options):
    return Config(tokenizer="bytes", cache_dir=str(tmp_path / "cache"), **options)


def test_a_text_of_ones_own_is_scored_whole(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("0123456789" * 30)
    config = config_for(tmp_path, dataset=str(file))
    lines = []
    name, split, tokens = prepare_split(config, ByteTokenizer(), None, lines.append)
    assert (name, split, tokens.n_bytes) == ("mine", "all", 300)
    assert any("300 bytes" in line for line in lines)
    assert prepare_split(config, ByteTokenizer(), "test", QUIET)[2].n_bytes == 15


def test_a_folder_with_a_test_split_alone_can_be_scored(tmp_path):
    folder = make(tmp_path / "data", "test.txt", "notes.md")
    config = config_for(tmp_path, dataset=str(folder))
    assert prepare_split(config, ByteTokenizer(), None, QUIET)[1:][0] == "test"
    assert prepare_split(config, ByteTokenizer(), "test", QUIET)[1] == "test"
    with pytest.raises(UserError, match="has no train split; use --split with one of test"):
        prepare_split(config, ByteTokenizer(), "train", QUIET)
    with pytest.raises(UserError, match="no train"):
        prepare_data(config, log=QUIET)


def test_only_what_is_scored_is_encoded(tmp_path):
    folder = make(tmp_path / "data", "train.txt", "valid.txt", "test.txt")
    config = config_for(tmp_path, dataset=str(folder))
    assert prepare_split(config, ByteTokenizer(), None, QUIET)[1] == "test"
    assert {f.stem for f in (tmp_path / "cache").rglob("*.bin")} == {"test"}


@pytest.mark.parametrize("pieces", [1, 3, 1 << 20])
def test_a_text_that_separates_documents(pieces, tmp_path, monkeypatch):
    monkeypatch.setattr("wavelet_lm.data.corpus.PIECE_BYTES", pieces)
    folder = make(tmp_path / "data", "valid.txt", text="v")
    (folder / "train.txt").write_text("one<|end|>two<|end|><|end|>three <|en")
    config = config_for(tmp_path, dataset=str(folder), document_separator="<|end|>")
    train = prepare_data(config, log=QUIET).train
    assert train.tokens.tobytes() == b"one\ntwo\nthree <|en"
    assert train.n_bytes == len(b"one\ntwo\nthree <|en")
    plain = prepare_data(config.replace(document_separator=None), log=QUIET).train
    assert plain.tokens.tobytes() == b"one<|end|>two<|end|><|end|>three <|en"


def test_a_separator_that_is_nowhere_is_said(tmp_path):
    folder = make(tmp_path / "data", "train.txt", "valid.txt", text="one<|end|>two")
    (folder / "valid.txt").write_text("one text, of enough words to be cut in three")
    lines = []
    config = config_for(tmp_path, dataset=str(folder), document_separator="<|end|>")
    prepare_data(config, log=lines.append)
    said = [line for line in lines if "document_separator" in line]
    assert said == [f"{folder}: document_separator does not occur in the valid split"]
    alone = config.replace(dataset=str(folder / "valid.txt"))
    prepare_data(alone, log=lines.append)
    assert f"{folder / 'valid.txt'}: document_separator does not occur in the text" in lines
    lines.clear()
    prepare_split(alone, ByteTokenizer(), None, lines.append)
    assert sum("document_separator" in line for line in lines) == 1


def test_other_files_of_a_folder_are_named(tmp_path):
    folder = make(tmp_path / "data", "a.txt", "notes.rst", "more/b.html")
    (folder / "a.txt").write_text("some text, of enough words to be cut in three")
    lines = []
    prepare_data(config_for(tmp_path, dataset=str(folder)), log=lines.append)
    (line,) = [line for line in lines if "not used" in line]
    assert "notes.rst" in line and "more/b.html" in line and "a.txt" not in line


def test_documents_are_cut_in_time_that_grows_with_the_text():
    """Of what a piece still holds, nothing is copied for each document in it."""

    class Counted(str):
        copied = 0

        def __getitem__(self, part):
            text = super().__getitem__(part)
            Counted.copied += len(text)
            return Counted(text)

        def __add__(self, other):
            return Counted(super().__add__(other))

        def __radd__(self, other):
            return Counted(other + str(self))

    documents = separated(lambda: iter([iter([Counted("ab|" * 1000)])]), "|")
    assert ["".join(document) for document in documents()] == ["ab"] * 1000 + [""]
    assert Counted.copied < 2 * 3000


def test_an_empty_separator_is_refused():
    with pytest.raises(UserError, match="document_separator is empty"):
        Config(document_separator="")


def test_a_separator_is_for_every_text_and_for_text_alone(tmp_path):
    plain = open_corpus(config_for(tmp_path, dataset="python-stdlib"), QUIET)
    config = config_for(tmp_path, dataset="python-stdlib", document_separator="def ")
    assert open_corpus(config, QUIET).key != plain.key
    (tmp_path / "a.wav").touch()
    config = config.replace(dataset=str(tmp_path), tokenizer="mulaw")
    with pytest.raises(UserError, match="document_separator is for text and mulaw reads audio"):
        prepare_data(config, log=QUIET)


def test_characters_have_a_line_break_where_one_stands_between_documents(tmp_path):
    folder = make(tmp_path / "data", "train/a.txt", "train/b.txt", "valid.txt", text="end.")
    config = config_for(tmp_path, dataset=str(folder)).replace(tokenizer="char")
    data = prepare_data(config, log=QUIET)
    assert data.tokenizer.decode(data.train.tokens) == "end.\nend."
    assert data.train.n_bytes == 9
    (folder / "train" / "b.txt").unlink()
    assert "\n" not in prepare_data(config, log=QUIET).tokenizer.characters


def test_a_file_whose_name_is_no_utf_8(tmp_path):
    file = os.fsdecode(os.fsencode(tmp_path) + b"/na\xffme.txt")
    try:
        Path(file).write_text("some text " * 20)
    except OSError:
        pytest.skip("the file system takes only names in UTF-8")
    assert prepare_data(config_for(tmp_path, dataset=file), log=QUIET).name == "name"


def test_files_are_not_glued_and_a_byte_order_mark_is_no_text(tmp_path):
    folder = tmp_path / "data"
    make(folder, "train/a.txt", text="The end.")
    (folder / "train" / "b.txt").write_bytes(b"\xef\xbb\xbfOnce upon")
    make(folder, "valid.txt")
    train = prepare_data(config_for(tmp_path, dataset=str(folder)), log=QUIET).train
    assert train.tokens.tobytes() == b"The end.\nOnce upon"


@pytest.mark.parametrize("tokenizer", ["char", "sentencepiece:300"])
def test_a_cache_that_cannot_be_written_can_be_read(tokenizer, tmp_path, monkeypatch):
    folder = make(tmp_path / "data", "valid.txt")
    make(folder, "train.txt", text="a quick brown fox jumps. " * 40)
    config = config_for(tmp_path, dataset=str(folder)).replace(tokenizer=tokenizer)
    first = prepare_data(config, log=QUIET)

    def refuse(*_):
        raise AssertionError("a lock was taken")

    monkeypatch.setattr(dataset, "locked", refuse)
    monkeypatch.setattr("wavelet_lm.data.encoding.locked", refuse)
    assert prepare_data(config, log=QUIET).keys == first.keys


def test_the_default_cache_is_where_the_desktop_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(Config()) == tmp_path / "wavelet_lm"
    assert cache_folder(Config(cache_dir="/somewhere")).as_posix() == "/somewhere"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(Config()).as_posix().endswith("/.cache/wavelet_lm")


def test_the_longest_names_of_files(tmp_path):
    file = tmp_path / f"{'é' * 118}.txt"
    file.write_text("some text " * 20)
    data = prepare_data(config_for(tmp_path, dataset=str(file)), log=QUIET)
    assert len(data.name.encode()) == 100


def test_sentencepiece_trains_on_lines_with_its_own_marks(tmp_path):
    folder = make(tmp_path / "data", "valid.txt")
    make(folder, "train.txt", text="a quick \u2585 brown\u2581 fox. " * 40)
    config = config_for(tmp_path, dataset=str(folder)).replace(tokenizer="sentencepiece:300")
    tokenizer = prepare_data(config, log=QUIET).tokenizer
    assert tokenizer.decode(tokenizer.encode("quick \u2585 fox")) == "quick \u2585 fox"
