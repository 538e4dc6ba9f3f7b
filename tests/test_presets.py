"""Presets by name: those of the repository, in any folder, and files before them."""

import json

import pytest

from tests.cli.test_command_lines import ROOT
from wavelet_lm.cli import train
from wavelet_lm.config import Config, find_config, presets, read_config
from wavelet_lm.errors import UserError
from wavelet_lm.training.processes import command_words
from wavelet_lm.training.run_folder import RunFolder


def test_the_presets_are_the_files_of_the_repository():
    files = {file.stem: file for file in (ROOT / "configs").glob("*.json")}
    files["headline"] = ROOT / "config.json"
    found = presets()
    assert found.keys() == files.keys()
    assert all(found[name].samefile(file) for name, file in files.items())


def test_names_are_known_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "configs/quickstart.json"):
        assert Config.from_json(name) == Config.from_json(ROOT / "configs" / "quickstart.json")
    assert Config.from_json("headline", layers=1) == Config.from_json(
        ROOT / "config.json", layers=1
    )


def test_a_file_wins_over_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text('{"layers": 7}')
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mini.json").write_text('{"layers": 8}')
    assert read_config("quickstart") == {"layers": 7}
    assert read_config("configs/mini.json") == {"layers": 8}
    assert find_config(tmp_path / "mini") == tmp_path / "mini"


def test_a_name_of_nothing_gets_the_nearest_and_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^quickstrt: .*did you mean quickstart\?.* headline$"):
        read_config("quickstrt")
    for absent in ("quickstart.json", "elsewhere/quickstart.json"):
        with pytest.raises(UserError, match="there is no such file"):
            read_config(absent)


def test_train_without_a_config_lists_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["wavelet-lm train"])
    with pytest.raises(UserError, match=r"which config\? .*--config quickstart"):
        train.main()
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["preset", *presets()]
    assert list(tmp_path.iterdir()) == []


def test_train_takes_the_config_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dataset": "nowhere.txt"}))
    monkeypatch.setattr("sys.argv", ["wavelet-lm train", "--device", "cpu", "--tokenizer", "char"])
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        train.main()


def test_what_is_to_be_typed_next_begins_as_what_was_typed(tmp_path, monkeypatch):
    """Where the project is installed there is no train.py."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert RunFolder(tmp_path).go_on == f"python train.py --resume {tmp_path}"
    monkeypatch.setattr("sys.argv", ["wavelet-lm train"])
    assert RunFolder(tmp_path).go_on == f"wavelet-lm train --resume {tmp_path}"
    assert command_words("generate") == ["wavelet-lm", "generate"]
