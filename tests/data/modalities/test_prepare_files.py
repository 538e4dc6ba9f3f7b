"""`prepare_data` on files that are no text: splits, caching, the kept tokenizer, contradictions."""

import sys

import numpy as np
import pytest

from wavelet_lm.config import DataConfig
from wavelet_lm.data.dataset import prepare_data
from wavelet_lm.data.modalities import find_modality
from wavelet_lm.data.modalities.midi import Note, write_notes
from wavelet_lm.data.tokenizers import load_tokenizer
from wavelet_lm.errors import UserError


def quiet(message):
    pass


def prepare(path, folder, tokenizer="encodec", log=quiet, **options):
    config = DataConfig(
        dataset=str(path), tokenizer=tokenizer, cache_dir=str(folder / "cache"), **options
    )
    return prepare_data(config, log=log)


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    for name, start in (("b/one", 50), ("a", 0), ("c", 80)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", np.arange(start, start + 50 - start // 4))
    return folder


def test_files_follow_each_other_and_are_cut_by_position(clips, tmp_path):
    tokens = [*range(50), *range(50, 88), *range(80, 110)]
    data = prepare(clips, tmp_path, split=(0.5, 0.25, 0.25))
    parts = [data.train.tokens, data.valid.tokens, data.test.tokens]
    assert np.concatenate(parts).tolist() == tokens
    assert list(map(len, parts)) == [59, 29, 30]
    assert (data.name, data.tokenizer.name, data.train.n_bytes) == ("clips", "encodec", 0)
    assert prepare(clips, tmp_path, split=(0.9, 0.1, 0.0)).test is None
    one = prepare(clips / "a.npy", tmp_path, split=(0.8, 0.2, 0.0))
    assert one.train.tokens.tolist() == list(range(40))


def test_named_splits_and_caching(clips, tmp_path, monkeypatch):
    for split in ("train", "validation", "test"):
        (clips / split).mkdir()
    np.save(clips / "train" / "x.npy", [1, 2, 3])
    np.save(clips / "validation" / "x.npy", [4, 5])
    np.save(clips / "test" / "x.npy", np.zeros(0, int))
    lines = []
    data = prepare(clips, tmp_path, log=lines.append)
    assert (data.train.tokens.tolist(), data.valid.tokens.tolist()) == ([1, 2, 3], [4, 5])
    assert data.test is None
    assert any("not used, as no split is named: a.npy" in line for line in lines)
    # A second time nothing is read.
    (clips / "test" / "x.npy").unlink()
    (clips / "test").rmdir()
    prepare(clips, tmp_path)
    monkeypatch.setattr(type(data.tokenizer), "read", None)
    assert prepare(clips, tmp_path).train.tokens.tolist() == [1, 2, 3]


def test_the_splits_of_maestros_table(tmp_path):
    folder = tmp_path / "maestro"
    (folder / "2004").mkdir(parents=True)
    rows = [("2004/b.midi", "train"), ("2004/a.midi", "validation"), ("2004/c.midi", "test")]
    for i, (name, _) in enumerate(rows):
        write_notes(folder / name, [Note(0, 10, 60 + i, 16)])
    table = folder / "maestro-v3.0.0.csv"
    header = "canonical_title,split,midi_filename\n"
    table.write_text(header + "".join(f'"A, B",{split},{name}\n' for name, split in rows))
    data = prepare(folder, tmp_path, "midi")
    parts = (data.train, data.valid, data.test)
    assert [part.tokens.tolist() for part in parts] == [
        [372, 60 + i, 265, 188 + i] for i in range(3)
    ]
    good = table.read_text()
    # As spreadsheets write it, and with a piece that it does not name.
    write_notes(folder / "extra.midi", [Note(0, 10, 70, 16)])
    table.write_text(
        "\ufeffsplit"
        + good.removeprefix("canonical_title,split")
        .replace('"A, B",train', '"A, B",Train')
        .replace('"A, B",', "")
    )
    lines = []
    same = prepare(folder, tmp_path, "midi", log=lines.append)
    assert same.keys == data.keys
    assert any("extra.midi" in line and "not used" in line for line in lines)
    (folder / "extra.midi").unlink()
    for before, after, message in (
        ("validation", "other", "line 3: split is 'other'"),
        ("2004/c", "2004/d", "line 4: there is no"),
        ("validation", "train", "names no valid files"),
        ("train,", "", "line 2: 2 columns where the first line names 3"),
    ):
        table.write_text(good.replace(before, after))
        with pytest.raises(UserError, match=message):
            prepare(folder, tmp_path, "midi")
    table.write_text("title,year\nx,1\n")  # another table
    assert len(prepare(folder, tmp_path, "midi").train.tokens) == 10


def test_what_the_files_taught_is_kept(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    (tmp_path / "images").mkdir()
    for i in range(3):
        image.fromarray(pixels[i]).save(tmp_path / "images" / f"{i}.png")
    data = prepare(tmp_path / "images", tmp_path, "pixels", split=(0.7, 0.3, 0.0))
    data.tokenizer.save(tmp_path / "run" / "tokenizer")
    again = load_tokenizer(tmp_path / "run")
    assert (again.width, again.height, again.fingerprint) == (5, 4, data.tokenizer.fingerprint)
    config = DataConfig(dataset=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    same = prepare_data(config, tokenizer=again, log=quiet)
    tokens = np.concatenate([same.train.tokens, same.valid.tokens, same.test.tokens])
    assert tokens.tolist() == list(range(60))
    image.fromarray(pixels[0][:, :2]).save(tmp_path / "images" / "x.png")
    with pytest.raises(UserError, match=r"x\.png: 2 by 4 pixels"):
        prepare(tmp_path / "images", tmp_path, "pixels")


@pytest.mark.parametrize(
    ("package", "name", "file"),
    [
        ("soundfile", "mulaw", "x.wav"),
        ("soxr", "pcm8", "x.wav"),
        ("mido", "midi", "x.mid"),
        ("pillow", "pixels", "x.png"),
    ],
)
def test_a_missing_library_is_named(package, name, file, tmp_path, monkeypatch):
    if package == "soxr":
        import soundfile

        soundfile.write(tmp_path / file, np.zeros(100), 8000)
    monkeypatch.setitem(sys.modules, {"pillow": "PIL.Image"}.get(package, package), None)
    with pytest.raises(UserError, match=f"x{file[1:]}: needs {package}, .*pip install {package}`"):
        find_modality(name, **SIZES.get(name, {})).read_prompt(tmp_path / file)


SIZES = {"pixels": {"width": 2, "height": 2}}


def test_contradictions_are_one_line(clips, tmp_path):
    def message(*arguments, **options):
        with pytest.raises(UserError) as error:
            prepare(*arguments, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "for .npy files use --tokenizer encodec" in message(clips, tmp_path, "bytes")
    assert "for .npy files use" in message(clips / "a.npy", tmp_path, "char")
    assert "holds no audio files (.wav/.flac)" in message(clips, tmp_path, "mulaw")
    assert "not a music file" in message(clips / "a.npy", tmp_path, "midi")
    for dataset in ("python-stdlib", "wikitext-103", "no/such/folder", ""):
        assert "is no file or folder" in message(dataset, tmp_path, "mulaw")
    for name in ("mulaw:2", "pixels:rgb", "midi2"):
        assert "unknown tokenizer" in message(clips, tmp_path, name)
    assert "the valid split is empty" in message(clips, tmp_path, split=(1.0, 0.0, 0.0))
    np.save(clips / "c.npy", [3000])
    assert "c.npy: code 3000 at position 0" in message(clips, tmp_path)
    with pytest.raises(UserError, match="are audio, not text; give the prompt as a file"):
        find_modality("mulaw").encode("hello")
