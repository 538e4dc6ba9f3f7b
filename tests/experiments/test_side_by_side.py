"""Runs on several devices at a time: each ends by itself, and all of them when they are told to."""

import signal
import time

import pytest

from tests.training import runs
from wavelet_lm.errors import UserError
from wavelet_lm.experiments.side_by_side import SideBySide, read_devices, threads_each
from wavelet_lm.json_files import read_json

# Stands in for a run: says its folder, waits, and ends with a status and a last line.
RUN = """
import sys, time
number, seconds, status, *flags = sys.argv[1:]
print("run folder logs/" + number)
print("on", flags[-1], flush=True)
time.sleep(float(seconds))
print("train.py: error: no luck" if int(status) else "done")
sys.exit(int(status))
"""


def command(number, seconds=0, status=0):
    return ["-c", RUN, str(number), str(seconds), str(status)]


def all_ends(side):
    ends = []
    while (ended := side.next_end()) is not None:
        ends.append(ended)
    return ends


def test_every_run_ends_once_and_says_how(tmp_path):
    side = SideBySide([command(0), command(1, 0, 2), command(2)], ["a", "b"], tmp_path)
    ends = {ended.number: ended for ended in all_ends(side)}
    assert sorted(ends) == [0, 1, 2]
    assert [ends[i].status for i in range(3)] == [0, 2, 0]
    assert ends[1].words == "no luck"
    assert [str(ends[i].run) for i in range(3)] == ["logs/0", "logs/1", "logs/2"]
    devices = [side.log_of(i).read_text().splitlines()[1] for i in range(3)]
    assert set(devices[:2]) == {"on a", "on b"}
    assert side.next_end() is None


def test_a_device_has_one_run_at_a_time(tmp_path):
    side = SideBySide([command(i, 0.2) for i in range(4)], ["a"], tmp_path)
    started = time.monotonic()
    assert [ended.number for ended in all_ends(side)] == [0, 1, 2, 3]
    assert time.monotonic() - started > 0.8


def test_a_signal_reaches_all_that_run_and_names_those_left(tmp_path):
    side = SideBySide([command(i, 60) for i in range(3)], ["a", "b"], tmp_path)
    while not all(side.log_of(i).exists() and side.log_of(i).read_text() for i in range(2)):
        time.sleep(0.01)
    assert side.stop(signal.SIGTERM) == [2]
    assert {(ended.number, ended.status) for ended in all_ends(side)} == {(0, -15), (1, -15)}


def test_devices_are_those_that_there_are(monkeypatch):
    assert read_devices("cpu, cpu") == ["cpu", "cpu"]
    with pytest.raises(UserError, match="device is 'tpu'"):
        read_devices("cpu,tpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="there is none; try cpu,cpu"):
        read_devices("all")
    assert threads_each(["cpu"] * 10_000) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "cpu"], "--devices spreads a sweep and there is none"),
        (["--set", "seed=1,2", "--devices", "cpu", "--device", "cpu"], "leave --device out"),
        (["--set", "seed=1,2", "--devices", "gpu7"], "device is 'gpu7'"),
    ],
)
def test_the_command_refuses(flags, message, tmp_path):
    line = runs.error_line("--config", runs.config_file(tmp_path), *flags)
    assert message in line
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_a_sweep_side_by_side_is_the_sweep_in_turn(tmp_path):
    short = {"max_steps": 4, "eval_interval": 2, "micro_batch_size": 1, "runs_file": None}
    file = runs.config_file(tmp_path, **short)
    done = runs.finished("--config", file, "--set", "seed=1,2,3", "--devices", "cpu,cpu")
    assert done.returncode == 0, done.stderr
    assert "2 at a time" in done.stdout
    (table,) = (tmp_path / "logs").glob("sweep_*.md")
    rows = [line for line in table.read_text().splitlines() if line.endswith("| done   |")]
    assert len(rows) == 3
    alone = runs.finished("--config", file, "--seed", 2, "--out_dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    (plain,) = (tmp_path / "alone").iterdir()
    (same,) = (
        folder
        for folder in (tmp_path / "logs").iterdir()
        if (folder / "config.json").exists() and read_json(folder / "config.json")["seed"] == 2
    )
    assert runs.figures(plain) == runs.figures(same)
