"""The benchmark of written texts, at a size where it says nothing about speed."""

import json
import sys

import generation
import pytest

from tests.conftest import TINY
from wavelet_lm.errors import UserError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command on a tiny config: the results that it wrote."""
    config, results = tmp_path / "tiny.json", tmp_path / "results.json"
    config.write_text(json.dumps(TINY))

    def run(*more):
        arguments = ["--config", config, "--tokenizer", "bytes", "--device", "cpu"]
        arguments += ["--tokens", 3, "--repeats", 2, *more, "--json", results]
        monkeypatch.setattr(sys, "argv", ["generation.py", *map(str, arguments)])
        generation.main()
        return json.loads(results.read_text())

    return run


def test_every_way_is_measured_beside_the_greedy_one(run, capsys):
    results = run("--batches", "1,2")
    places = [(row["way"], row["batch"]) for row in results["rows"]]
    assert places == [(way, batch) for batch in (1, 2) for way in generation.WAYS]
    for row in results["rows"]:
        seconds = row["milliseconds"] / 1000
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / seconds, rel=1e-2)
        assert (row["way"] != "greedy") or row["over_greedy"] == 1
    assert results["n_params"] > 0
    assert "times greedy" in capsys.readouterr().out


def test_what_cannot_be_is_one_line(run):
    with pytest.raises(UserError, match="--ways has 'fast'; known are greedy, draw"):
        run("--ways", "fast")
    with pytest.raises(UserError, match="--tokenizer is 'words'"):
        run("--tokenizer", "words")
