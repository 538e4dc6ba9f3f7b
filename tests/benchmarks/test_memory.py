import json
import sys

import memory
import pytest

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError


def test_the_command_is_measured_and_written_down(tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.json"
    config.write_text(Config(C=16, layers=1, per_scale_mixer_widths=None).to_json())
    arguments = ["memory.py", "--config", str(config), "--tokenizer", "bytes"]
    arguments += ["--dtypes", "bfloat16", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    memory.main()
    results = json.loads((tmp_path / "x.json").read_text())
    (row,) = results["rows"]
    assert {"machine", "commit"} <= results.keys()
    assert row["weight_bytes"] == 2 * row["n_params"]
    assert 1e8 < row["peak_bytes"] < 1e9  # Python and PyTorch at least
    assert "bfloat16" in capsys.readouterr().out


def test_a_command_that_fails_and_a_dtype_that_is_none_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"generate.py failed: .*no such checkpoint"):
        memory.peak_bytes(tmp_path / "none.safetensors", "float32", 1)
    with pytest.raises(UserError, match="'int8'; known are"):
        memory.dtype_list("float32,int8")


@pytest.mark.slow
def test_the_mini_model_stays_in_its_limit(tmp_path):
    config = Config.from_json("configs/mini.json")
    for row in memory.measure(config, "gpt2", ["float32", "bfloat16"], 8):
        assert row["within"], row
