"""Reviews as bytes: the layouts of their files, and the faults that files have."""

import os

import pytest

from wavelet_lm.data.tasks import reviews
from wavelet_lm.errors import UserError

TEXTS = {
    "neg": [f"not good, {i} of 10 — naïve" for i in range(20)],
    "pos": [f'a "gem": {i}, <br />\r\n10/10' for i in range(30)],
}


def write_folder(folder):
    for name, texts in TEXTS.items():
        (folder / name).mkdir(parents=True)
        for i, text in enumerate(texts):
            (folder / name / f"{i:02}_7.txt").write_bytes(text.encode())


def write_table(file):
    rows = ["id,text,label\n"]
    for name, texts in TEXTS.items():
        rows += ['{},"{}",{}\n'.format(i, t.replace('"', '""'), name) for i, t in enumerate(texts)]
    file.write_bytes("".join(rows).encode())


def contents(examples):
    texts = [examples.sequence(i).tobytes() for i in range(len(examples))]
    return sorted(zip(texts, examples.labels, strict=True))


ALL = sorted((text.encode(), label) for label, k in enumerate(TEXTS) for text in TEXTS[k])


@pytest.mark.parametrize("layout", ["folders", "tables", "one folder", "one table"])
def test_every_layout_gives_the_same_reviews(layout, tmp_path):
    path = tmp_path / "reviews"
    match layout:
        case "folders":
            write_folder(path / "train")
            write_folder(path / "test")
            (path / "train" / "unsup").mkdir()
        case "tables":
            path.mkdir()
            write_table(path / "train.csv")
            write_table(path / "test.csv")
        case "one folder":
            write_folder(path)
        case "one table":
            path = tmp_path / "reviews.csv"
            write_table(path)
    task = reviews.load(path, seed=1)
    assert (task.vocab_size, task.n_classes) == (256, 2)
    parts = [task.train, task.valid]
    if layout.startswith("one"):
        parts.append(task.test)
        assert len(task.test) == 5
    else:
        assert contents(task.test) == ALL
    assert sorted(row for part in parts for row in contents(part)) == ALL
    assert sorted(task.valid.labels) == [0, 0, 1, 1, 1]  # a tenth of each class
    assert contents(reviews.load(path, seed=1).valid) == contents(task.valid)
    assert contents(reviews.load(path, seed=2).valid) != contents(task.valid)


def test_bytes_are_cut_and_kept_as_they_are(tmp_path):
    """In the middle of a character, and where they are no UTF-8 at all."""
    file = tmp_path / "reviews.tsv"
    row = b'\xff\x00 "caf\xc3\xa9'
    file.write_bytes(b"label\ttext\n" + b"".join(b"%d\t%b\n" % (i % 2, row) for i in range(20)))
    assert reviews.load(file, seed=1).test.sequence(0).tobytes() == row
    short = reviews.load(file, seed=1, max_length=8)
    assert short.test.sequence(0).tobytes() == row[:8]
    assert short.longest == 8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.tsv", "text\tstars\nbad\t1\n", ["line 1", "no column 'label'"]),
        ("r.tsv", "label\ttext\n1\tgood\n2\tbetter\n", ["line 3", "'2'", "neg"]),
        ("r.tsv", "label\ttext\n1\tgood\n0\n", ["line 3", "1 columns"]),
        ("r.tsv", "label\ttext\n1\tgood\n0\t  \n", ["line 3", "empty"]),
        ("r.tsv", "label\ttext\n1\tgood\n1\tfine\n", ["no review that is neg"]),
        ("r.tsv", "label\ttext\n1\tgood\n0\tbad\n", ["too few"]),
        ("r.csv", 'label,text\n1,good\n0,"bad\n1,good\n', ["line 4", "unexpected end of data"]),
        ("r.csv", 'label,text\n0,"bad" and "ugly"\n', ["line 2"]),
        ("r.parquet", "PAR1", ["aclImdb", "84 MB"]),
        ("neg/1.txt", "bad", ["aclImdb", "84 MB"]),
        ("elsewhere", "", ["does not exist", "aclImdb_v1.tar.gz", "84 MB", "--data data/aclImdb"]),
    ],
)
def test_faults_are_one_line_with_file_and_line(name, content, words, tmp_path):
    file = path = tmp_path / name
    if name == "elsewhere":
        path = tmp_path / "nowhere"
    elif "/" in name:
        path = tmp_path
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    with pytest.raises(UserError) as error:
        reviews.load(path, seed=1)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in [str(path), *words]), message


def test_an_empty_or_unreadable_review_is_named(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "pos" / "03_7.txt"
    file.write_bytes(b"\n")
    with pytest.raises(UserError, match=r"pos/03_7\.txt: the review is empty"):
        reviews.load(tmp_path, seed=1)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"pos/03_7\.txt: cannot be read"):
        reviews.load(tmp_path, seed=1)


def test_no_review_is_left_out_in_silence(tmp_path, monkeypatch):
    write_folder(tmp_path)
    (tmp_path / "pos" / "03_7.txt").rename(tmp_path / "pos" / "03_7.TXT")
    task = reviews.load(tmp_path, seed=1)
    assert sum(map(len, (task.train, task.valid, task.test))) == len(ALL)
    real = os.scandir

    def refuse(folder):
        if str(folder).endswith("pos"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"pos: cannot be read \(Permission denied\)"):
        reviews.load(tmp_path, seed=1)


def test_a_validation_split_that_is_there_is_used(tmp_path):
    for part in ("train", "valid", "test"):
        write_table(tmp_path / f"{part}.csv")
    task = reviews.load(tmp_path, seed=1)
    assert contents(task.train) == contents(task.valid) == contents(task.test) == ALL


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (("train.csv", "train.tsv", "test.csv"), r"train\.tsv and train\.csv are both there"),
        (("train.csv",), r"there is train\.csv but no test; add it"),
        (("test.csv", "valid.csv"), r"there is test\.csv but no train; add it"),
    ],
)
def test_splits_that_leave_a_question_are_refused(files, line, tmp_path):
    for file in files:
        write_table(tmp_path / file)
    with pytest.raises(UserError, match=line):
        reviews.load(tmp_path, seed=1)


@pytest.mark.parametrize(("name", "what"), [("more", "a folder"), ("03.html", "no .txt file")])
def test_what_is_no_review_among_reviews_is_named(name, what, tmp_path):
    write_folder(tmp_path)
    place = tmp_path / "pos" / name
    place.mkdir() if what == "a folder" else place.touch()
    with pytest.raises(UserError, match=f"{name}: {what} among the reviews"):
        reviews.load(tmp_path, seed=1)
