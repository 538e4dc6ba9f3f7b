"""Files of results, and what they say of the machine and the command."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from wavelet_lm.errors import UserError
from wavelet_lm.experiments.results import check_targets, write_results
from wavelet_lm.training.provenance import command_line


def test_results_say_where_they_come_from(tmp_path):
    write_results(tmp_path / "r.json", [{"x": 1}], config="c.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert set(results) == {"machine", "commit", "date", "config", "rows"}
    assert results["machine"]["torch"] == torch.__version__
    assert results["rows"] == [{"x": 1}] and results["config"] == "c.json"


def test_a_missing_folder_is_noticed_first(tmp_path):
    check_targets([None, str(tmp_path / "a.json"), "a.json"])
    with pytest.raises(UserError, match=r"there is no folder .*none; make it first"):
        check_targets([str(tmp_path / "none" / "a.json")])


@pytest.mark.parametrize(
    ("module", "command"),
    [
        (None, "python some/train.py --lr 0.1"),
        ("wavelet_lm.evaluation.__main__", "python -m wavelet_lm.evaluation --lr 0.1"),
        ("wavelet_lm.evaluation.lra", "python -m wavelet_lm.evaluation.lra --lr 0.1"),
    ],
)
def test_the_command_is_as_it_was_typed(module, command, monkeypatch):
    main = ModuleType("__main__")
    main.__spec__ = module and ModuleSpec(module, None, origin="some/train.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["some/train.py", "--lr", "0.1"])
    assert command_line() == command
