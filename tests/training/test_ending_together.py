"""Several processes end together: one line says why, and a whole checkpoint is left."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.training import runs
from tests.training.several import PATIENCE, ended, run_job, started
from wavelet_lm.models.registry import build_model
from wavelet_lm.training.checkpoint_folder import saved_steps
from wavelet_lm.training.process_group import ProcessGroup
from wavelet_lm.training.sharded_checkpoint import ShardedCheckpoint

SECONDS = 30


def started_run(folder: Path, size: int, **overrides):
    """`train.py` in several processes, of a run that does not end by itself."""
    endless = {"max_steps": 100_000, "save_interval": 2, "eval_interval": 100_000}
    config = runs.config_file(folder, **{**endless, **overrides})
    return started(size, runs.ROOT / "train.py", "--config", config)


def wait_for(what, processes) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert all(process.poll() is None for process in processes), ended(processes)
        assert time.monotonic() < until
        time.sleep(0.05)


def n_saved(folder: Path) -> int:
    return len(saved_steps(runs.only_run(folder) / "checkpoints"))


def has_saved(folder: Path) -> bool:
    return (folder / "logs").is_dir() and bool(list(folder.glob("logs/*/checkpoints/step_*")))


def lines_of_errors(results) -> list[str]:
    return [line for _, _, stderr in results for line in stderr.splitlines() if line]


def assert_goes_on(folder: Path) -> None:
    """What is left is whole: a process trains on from it, alone."""
    (step, _, _) = saved_steps(runs.only_run(folder) / "checkpoints")[-1]
    run_job(
        {"resume": str(runs.only_run(folder)), "flags": {"max_steps": step + 1, "parallel": "auto"}}
    )


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_other(tmp_path, killed):
    with started_run(tmp_path, 2, parallel="fsdp" if killed else "ddp") as processes:
        wait_for(lambda: has_saved(tmp_path), processes)
        processes[killed].kill()
        at = time.monotonic()
        results = ended(processes)
    assert time.monotonic() - at < SECONDS
    assert results[killed][0] == -signal.SIGKILL
    assert results[1 - killed][0] == 2
    (line,) = lines_of_errors(results)
    assert line.startswith(f"train.py: error: rank {killed} is gone")
    assert_goes_on(tmp_path)


def test_why_is_said_once_and_before_anybody_can_hear_of_it():
    """The main thread of a process ends in silence when its heart has spoken."""
    group, store, said = object.__new__(ProcessGroup), torch.distributed.HashStore(), []
    group._heart_store = store

    def say(reason: str) -> None:
        said.append((reason, store.check(["failed"])))

    assert group._speaks_first("rank 1 is gone", say)
    assert not group._speaks_first("another reason", say)
    assert said == [("rank 1 is gone", False)]
    assert store.get("failed") == b"rank 1 is gone"


IN_THE_STORE = """
import sys, time
from wavelet_lm.training import process_group
from wavelet_lm.training.together import together

process_group.BEAT = 0.0  # a heart that is nearly always in the store
with together():
    time.sleep(0.5)
    if sys.argv[1] != "0":
        raise SystemExit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [0, 3])
def test_no_thread_is_in_the_store_when_the_interpreter_ends(tmp_path, status):
    script = tmp_path / "in_the_store.py"
    script.write_text(IN_THE_STORE)
    with started(2, script, str(status)) as processes:
        results = ended(processes)
    assert [found for found, _, _ in results] == [status] * 2, results


def test_a_signal_to_one_process_stops_all_and_saves(tmp_path):
    with started_run(tmp_path, 2, save_interval=100_000) as processes:
        wait_for(lambda: list(tmp_path.glob("logs/*/metrics.jsonl")), processes)
        processes[1].send_signal(signal.SIGTERM)
        at = time.monotonic()
        results = ended(processes)
    assert time.monotonic() - at < SECONDS
    assert [status for status, _, _ in results] == [128 + signal.SIGTERM] * 2
    (line,) = lines_of_errors(results)
    assert "stopped and saved at step" in line
    assert "torchrun --nproc_per_node=2 train.py --resume" in line
    assert_goes_on(tmp_path)


def test_what_the_user_got_wrong_is_said_once(tmp_path):
    config = runs.config_file(tmp_path, dataset="/nowhere.txt")
    with started(2, runs.ROOT / "train.py", "--config", config) as processes:
        results = ended(processes)
    assert [status for status, _, _ in results] == [2, 2]
    (line,) = lines_of_errors(results)
    assert "missing data path" in line


def whole_states(folder: Path) -> list[int]:
    """The steps of the checkpoints that are there; each of them can be read to its last tensor."""
    found = saved_steps(runs.only_run(folder) / "checkpoints")
    for _, _, path in found:
        checkpoint = ShardedCheckpoint(path)
        checkpoint.load_into(build_model(checkpoint.config, checkpoint.vocab_size))
        assert checkpoint.extra()
    return [step for step, _, _ in found]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path, seed):
    draw = random.Random(seed)
    killed, kind = draw.randrange(2), draw.choice(("ddp", "fsdp"))
    overrides = {"parallel": kind, "save_interval": 1, "keep_checkpoints": 2, "C": 64}
    with started_run(tmp_path, 2, **overrides) as processes:
        wait_for(lambda: has_saved(tmp_path), processes)
        time.sleep(2 * draw.random())
        processes[killed].kill()
        at = time.monotonic()
        results = ended(processes)
    assert time.monotonic() - at < SECONDS
    (line,) = lines_of_errors(results)
    assert line.startswith(f"train.py: error: rank {killed} is gone")
    assert whole_states(tmp_path)
    assert_goes_on(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_all_killed_while_they_write(tmp_path, seed):
    overrides = {"parallel": "fsdp", "save_interval": 1, "C": 128, "layers": 4}
    with started_run(tmp_path, 2, **overrides) as processes:
        wait_for(lambda: has_saved(tmp_path), processes)
        time.sleep(random.Random(seed).random())
        wait_for(lambda: list(tmp_path.glob("logs/*/checkpoints/.step*.tmp/*")), processes)
        for process in processes:
            process.kill()
        ended(processes)
    assert whole_states(tmp_path)
    assert_goes_on(tmp_path)
    assert not list(tmp_path.glob("logs/*/checkpoints/.*"))
