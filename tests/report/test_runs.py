"""What a table of runs says, of those that ended, run, stopped and died; and what a page draws."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.conftest import tiny_config
from tests.report.folders import run_folder
from wavelet_lm.cli import runs as command
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.models.checkpoint import save_checkpoint
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.report.runs import MOST_POINTS, curves_of, figures_of, find_runs
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.running import MARK, running, state_of

HOLDS = """
import sys, time
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.running import running
with running(RunFolder(sys.argv[1])):
    print("here", flush=True)
    time.sleep(600)
"""


def typed(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["wavelet-lm runs", *map(str, words)])
    command.main()
    return capsys.readouterr().out


def test_a_run_is_running_while_its_process_is_and_then_has_died(tmp_path):
    run = RunFolder(run_folder(tmp_path / "a", 12, ends=False))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "here\n"
        assert state_of(run) == "running"
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert state_of(run) == "died"


def test_how_a_run_left_off_is_known(tmp_path):
    run = RunFolder(run_folder(tmp_path / "a", 12, ends=False))
    with pytest.raises(Interrupted), running(run):
        raise Interrupted(signal.SIGINT, "stopped and saved")
    assert state_of(run) == "stopped"
    with pytest.raises(UserError), running(run):
        raise UserError("training diverged")
    assert state_of(run) == "died"
    ended = RunFolder(run_folder(tmp_path / "b", 40))
    with running(ended):
        assert state_of(ended) == "running"
    assert state_of(ended) == "ended"
    assert not (ended.path / MARK).exists()
    ended.write_metrics(event="train", step=41, loss=1.0, seconds=30.0)  # it is trained longer
    assert state_of(ended) == "stopped"


def test_the_table_says_what_the_folders_hold(tmp_path, monkeypatch, capsys):
    run_folder(tmp_path / "logs" / "one", 40)
    two = run_folder(tmp_path / "logs" / "comparison" / "two", 13, ends=False, lr=0.02)
    (two / MARK).touch()
    model = build_model(tiny_config(), 50)
    extra = {"optimizer/0/x/sum": torch.zeros(9)}
    save_checkpoint(two / "last.safetensors", model, {"total_steps": 40}, extra)
    (tmp_path / "logs" / "no run").mkdir()
    out = typed(monkeypatch, capsys, tmp_path / "logs", "--json", tmp_path / "runs.json")
    heads, *lines = (line.split("  ") for line in out.splitlines())
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    assert [heads[0].strip(), heads[-1].strip()] == ["run", "time"]
    by_name = {line[0].rpartition("/")[2]: line[1:] for line in cells}
    one = ["ended", "wavelet_lm", "1.2 k", "40/40", "10.2 k", f"{3.5 / math.log(2):.4f}", "20.0 s"]
    assert by_name["one"] == one
    assert by_name["two"][:2] + by_name["two"][3:5] == ["died", "wavelet_lm", "13/40", "3.3 k"]
    found = {row["name"]: row for row in json.loads((tmp_path / "runs.json").read_text())}
    assert found["two"]["n_params"] == n_params(model)
    assert found["two"]["amount"] == 13 * 8 * 32
    assert found["one"]["test_bits_per_byte"] == 2.5
    assert found["one"]["memory_bytes"] == 2**20


def test_a_run_that_was_stopped_is_where_its_checkpoint_is(tmp_path):
    """Lines tell of every tenth step; Ctrl-C saves at whichever it comes."""
    path = run_folder(tmp_path / "a", 10, ends=False)
    saved = {"step": 14, "total_steps": 40, "seconds": 7.5}
    save_checkpoint(path / "last.safetensors", build_model(tiny_config(), 50), saved)
    found = figures_of(RunFolder(path))
    assert (found.step, found.amount, found.seconds) == (14, 14 * 8 * 32, 7.5)
    (path / "last.safetensors").unlink()
    (path / "checkpoints" / "step_00000017").mkdir(parents=True)  # of several processes
    assert figures_of(RunFolder(path)).step == 17


def test_a_damaged_run_hides_no_other(tmp_path, monkeypatch, capsys):
    run_folder(tmp_path / "logs" / "one", 40)
    two = run_folder(tmp_path / "logs" / "two", 13)
    (two / "config.json").write_text("{", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["wavelet-lm runs", str(tmp_path / "logs")])
    command.main()
    found = capsys.readouterr()
    assert len(found.out.splitlines()) == 2
    assert found.err.startswith(f"left out: {two / 'config.json'}: ")


@pytest.mark.parametrize(
    ("key", "order"), [("bits", "ba"), ("steps", "ba"), ("name", "ab"), ("parameters", "ba")]
)
def test_a_table_is_sorted_and_what_is_not_known_comes_last(
    tmp_path, monkeypatch, capsys, key, order
):
    run_folder(tmp_path / "a", 20, ends=False)
    run_folder(tmp_path / "b", 40)
    lines = typed(monkeypatch, capsys, tmp_path, "--sort", key).splitlines()[1:]
    assert "".join(line.split()[0][-1] for line in lines) == order


def test_a_classifiers_run_has_sequences_and_a_score(tmp_path):
    path = run_folder(tmp_path / "a", 10)
    rows = [
        {"event": "train", "step": 4, "loss": 1.0, "sequences_per_second": 3.0, "seconds": 1.0},
        {"event": "eval", "step": 4, "score": 0.75},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = figures_of(RunFolder(path))
    assert (found.unit, found.amount, found.per_second) == ("sequences", 32, 3.0)
    assert (found.best_score, found.best_bits_per_byte) == (0.75, None)


def test_places_without_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        find_runs([tmp_path / "logs"])
    with pytest.raises(UserError, match="no run folder"):
        find_runs([tmp_path])
    with pytest.raises(UserError, match="hf://a/b: is in the hub"):
        find_runs(["hf://a/b"])
    run = run_folder(tmp_path / "a", 1)
    assert len(find_runs([tmp_path, run])) == 1


def test_curves_are_the_lines_or_means_of_neighbours(tmp_path):
    run = RunFolder(run_folder(tmp_path / "a", 20))
    curves = curves_of(run)
    assert curves["train"]["loss"] == pytest.approx([5 - step / 20 for step in range(1, 21)])
    assert curves["valid"]["seconds"] == [0.0, 5.0, 10.0]
    assert curves["scales"]["weights"]["block 1 d1"] == [0.5] * 3
    assert curves["scales"]["lags"] == {"block 1 d1": [2.5] * 3, "block 1 d0": [1.0] * 3}
    n = 2 * MOST_POINTS + 1
    for step in range(21, n + 1):
        run.write_metrics(event="train", step=step, loss=float(step), seconds=step / 2)
    curves = curves_of(run)
    assert curves["together"] == 3
    assert len(curves["train"]["step"]) <= MOST_POINTS
    assert curves["train"]["step"][-1] == n
    assert curves["train"]["loss"][10] == 32  # of 31, 32 and 33
    assert curves["train"]["lr"][10] is None
