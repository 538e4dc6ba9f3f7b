import json
import sys

import pytest
import serving
from served_process import streamed_text

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError


def test_a_server_is_measured_and_written_down(tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.json"
    small = Config(C=64, layers=1, levels=2, mlp_expansion=1, per_scale_mixer_widths=None)
    config.write_text(small.to_json())
    arguments = ["serving.py", "--config", str(config), "--json", str(tmp_path / "x.json")]
    for name, n in (("streams", 3), ("tokens", 5), ("repeats", 1), ("prompt", 40)):
        arguments += [f"--{name}", str(n)]
    arguments += ["--states", "2", "--soak", "8", "--gpt_context", "32", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    serving.main()
    results = json.loads((tmp_path / "x.json").read_text())
    ours, gpt = results["rows"]
    for row in (ours, gpt):
        assert (row["texts"], row["texts_equal"]) == (3, 3)
        assert row["tokens_per_second"]["at_once"] > 0 < row["tokens_per_cpu_second"]["alone"]
        assert row["state_bytes"] > 0
    assert len(ours["soak"]["resident_bytes"]) == serving.SAMPLES
    assert 0 < ours["first_token_known"]
    printed = capsys.readouterr()
    assert "3 of 3" in printed.out
    assert "8 of 8 requests" in printed.err  # it is seen to go on


def test_texts_longer_than_what_the_gpt_reads_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serving.py", "--tokens", "256", "--gpt_context", "256"])
    with pytest.raises(UserError, match="--tokens 256 after a prompt of 8 are more than the 256"):
        serving.main()


def test_a_stream_that_failed_is_one_line():
    assert streamed_text(b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n') == "a"
    with pytest.raises(UserError, match="full"):
        streamed_text(b'HTTP/1.1 503\r\n\r\n{"error": {"message": "full"}}')
