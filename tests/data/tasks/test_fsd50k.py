"""FSD-50K from a folder as it is published, made here, and its faults by file and line."""

import numpy as np
import pytest
import soundfile
import torch

from wavelet_lm.data.tasks.fsd50k import load
from wavelet_lm.errors import UserError

CLASSES = ("Bark", "Dog", "Rain")
DEV = "fname,labels,mids,split\n"
EVAL = "fname,labels,mids\n"


def make_data(folder, n=2, seconds=(1.6, 0.31), rate=44100):
    """n clips of each split, tones whose pitch tells the class."""
    for name in ("ground_truth", "dev_audio", "eval_audio"):
        (folder / f"FSD50K.{name}").mkdir(parents=True)
    truth = folder / "FSD50K.ground_truth"
    vocabulary = (f"{i},{name},/m/{i}\n" for i, name in enumerate(CLASSES))
    (truth / "vocabulary.csv").write_text("".join(vocabulary))
    number, dev, evaluation = 100, DEV, EVAL
    for split in ("train", "val", "test"):
        for i in range(n):
            rain = i % 2
            labels, mids = ("Rain", "/m/2") if rain else ('"Bark,Dog"', '"/m/0,/m/1"')
            tone = np.sin(np.arange(int(seconds[rain] * rate)) * (0.3 if rain else 0.05)) / 2
            part = "eval" if split == "test" else "dev"
            soundfile.write(folder / f"FSD50K.{part}_audio" / f"{number}.wav", tone, rate)
            if split == "test":
                evaluation += f"{number},{labels},{mids}\n"
            else:
                dev += f"{number},{labels},{mids},{split}\n"
            number += 1
    (truth / "dev.csv").write_text(dev)
    (truth / "eval.csv").write_text(evaluation)
    return folder


def test_pieces_of_a_second_with_the_labels_of_their_clip(tmp_path):
    task = load(make_data(tmp_path / "data"), patch=400)
    assert task.classes == CLASSES
    for part in (task.train, task.valid, task.test):
        assert part.clip_of.tolist() == [0, 0, 1]
        assert part.lengths.tolist() == [40, 24, 13]  # of 1 s, 0.6 s and 0.31 s
        assert part.labels.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    sounds, lengths, labels = task.train.batch([2, 1])
    assert sounds.shape == (2, 16000)
    assert (lengths.tolist(), labels.tolist()) == ([13, 24], [[0, 0, 1], [1, 1, 0]])
    assert labels.dtype == sounds.dtype == torch.float32
    assert sounds[0, :4900].abs().max() > 0.4
    assert sounds[0, 4970:].abs().max() == 0
    # The second piece goes on where the first one ended.
    position = np.arange(1000, 9000) / 16000 + 1
    expected = np.sin(position * 44100 * 0.05) / 2
    np.testing.assert_allclose(sounds[1, 1000:9000], expected, atol=1e-3)
    assert len(load(tmp_path / "data", 400, limit=1).train.clips) == 1


def test_tab_separated_tables_and_short_folder_names(tmp_path):
    folder = make_data(tmp_path / "data")
    for part in folder.iterdir():
        part.rename(folder / part.name.removeprefix("FSD50K."))
    truth = folder / "ground_truth"
    for table in list(truth.iterdir()):
        text = table.read_text().replace('"Bark,Dog"', "Bark;Dog").replace('"/m/0,/m/1"', "x")
        table.with_suffix(".tsv").write_text(text.replace(",", "\t").replace(";", ","))
        table.unlink()
    assert load(folder, 400).train.labels.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        ("dev.csv", "Rain", "Snow", "dev.csv, line 3: label 'Snow' is not among the 3 classes"),
        ("dev.csv", ",split", ",part", "dev.csv, line 1: no column 'split'"),
        ("eval.csv", "fname,labels", "fname,label", "eval.csv, line 1: no column 'labels'"),
        ("dev.csv", "train", "test", "dev.csv, line 2: split is 'test'"),
        ("dev.csv", "101,", "999,", "dev.csv, line 3: there is no"),
        ("dev.csv", ",/m/2", "", "dev.csv, line 3: 3 columns where the first line names 4"),
        ("eval.csv", "Rain", "", "eval.csv, line 3: label '' is not among"),
        ("vocabulary.csv", "1,Dog", "1,Bark", "vocabulary.csv, line 2: '1,Bark,/m/1' must be 1"),
        ("vocabulary.csv", "0,Bark", "Bark", "vocabulary.csv, line 1"),
        ("dev.csv", "val", "train", "there are no clips of split val"),
    ],
)
def test_faulty_tables(file, before, after, message, tmp_path):
    folder = make_data(tmp_path / "data")
    table = folder / "FSD50K.ground_truth" / file
    assert before in table.read_text()
    table.write_text(table.read_text().replace(before, after))
    with pytest.raises(UserError) as error:
        load(folder, 400)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_faulty_sounds_and_missing_parts(tmp_path):
    folder = make_data(tmp_path / "data")
    sound = folder / "FSD50K.dev_audio" / "101.wav"
    sound.write_bytes(sound.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"101\.wav: cut short"):
        load(folder, 400)
    soundfile.write(sound, np.zeros(0), 16000)
    with pytest.raises(UserError, match=r"101\.wav: holds no samples"):
        load(folder, 400)
    (folder / "FSD50K.eval_audio").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"no folder FSD50K\.eval_audio; .* 34 GB .* 4060432"):
        soundfile.write(sound, np.zeros(100), 16000)
        load(folder, 400)


@pytest.mark.parametrize("twice", ["FSD50K.ground_truth/dev.tsv", "eval_audio/"])
def test_what_is_there_twice_is_asked_about(twice, tmp_path):
    folder = make_data(tmp_path / "data")
    place = folder / twice
    place.mkdir() if twice.endswith("/") else place.touch()
    with pytest.raises(UserError, match="are both there; remove or rename one"):
        load(folder, 400)
