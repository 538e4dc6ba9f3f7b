"""The benchmark of a shared machine: what it starts it ends, and the file can be read."""

import json
import sys

import pytest
import shared_machine

from tests.conftest import tiny_config
from wavelet_lm import UserError

SMALL = {"C": 8, "layers": 1, "levels": 1, "block_size": 8, "per_scale_mixer_widths": None}
SMALL |= {"pkm_enabled": False, "fwpkm_enabled": False, "micro_batch_size": 1}


def test_a_small_measurement(tmp_path, monkeypatch, capsys):
    started = []

    class Recorded(shared_machine.subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.extend([self] if self.args[0] == sys.executable else [])

    monkeypatch.setattr(shared_machine.subprocess, "Popen", Recorded)
    config, results = tmp_path / "small.json", tmp_path / "results.json"
    config.write_text(tiny_config(**SMALL).to_json(), encoding="utf-8")
    arguments = ["--config", config, "--settings", "one,spin:10", "--busy", "0,1"]
    arguments += ["--seconds", "0.01", "--repeats", "2", "--json", results]
    monkeypatch.setattr(sys, "argv", ["shared_machine.py", *map(str, arguments)])
    shared_machine.main()
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    assert [(row["busy"], row["setting"]) for row in rows] == [
        (0, "one"), (0, "spin:10"), (1, "one"), (1, "spin:10"),
    ]  # fmt: skip
    assert all(len(row["turns"]) == 2 and row["tokens_per_second"] > 0 for row in rows)
    assert {row["threads"] for row in rows if row["setting"] == "one"} == {1}
    assert "of alone" in capsys.readouterr().out
    assert len(started) == 3  # two that train, one that is busy
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize("setting", ["two", "spin:", "spin:x", ""])
def test_an_unknown_setting_is_refused(setting):
    with pytest.raises(UserError, match="it may have ours, spinning, sleeping, one, spin:N"):
        shared_machine.variables_of(setting)
