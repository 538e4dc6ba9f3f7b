"""What of a run is kept, and what several processes and one refuse of each other."""

import subprocess
import sys

import pytest

from tests.training import runs
from wavelet_lm.errors import UserError
from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.training.checkpoint_folder import checkpoint_name, forget_older, saved_steps
from wavelet_lm.training.processes import Processes, launcher, n_processes, one_process_only
from wavelet_lm.training.run import train


def test_one_process_keeps_as_many_states_as_it_is_told(tmp_path):
    lengths = {"max_steps": 7, "save_interval": 2, "eval_interval": 7}
    run = train(runs.run_config(tmp_path, keep_checkpoints=3, **lengths))
    kept = saved_steps(run.checkpoints)
    assert [step for step, _, _ in kept] == [4, 6, 7]
    for step, _, file in kept:
        assert Checkpoint(file).metadata["step"] == step
    runs_of_last, of_kept = runs.tensors(run.last), runs.tensors(kept[-1][2])
    assert all(of_kept[name].equal(values) for name, values in runs_of_last.items())


def test_folders_are_named_by_step_and_turn_and_the_oldest_goes(tmp_path):
    for step in (9, 10, 10, 123_456_789):
        (tmp_path / checkpoint_name(tmp_path, step)).mkdir()
    (tmp_path / ".step_00000011.tmp").mkdir()
    assert [(step, turn) for step, turn, _ in saved_steps(tmp_path)] == [
        (9, 1),
        (10, 1),
        (10, 2),
        (123_456_789, 1),
    ]
    forget_older(tmp_path, 2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".step_00000011.tmp", "step_00000010_2", "step_123456789"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_is_no_several(tmp_path, kind):
    config = runs.config_file(tmp_path, parallel=kind)
    line = runs.error_line("--config", config)
    assert f"parallel is {kind} and there is one process" in line
    assert "torchrun" in line


def test_what_runs_in_one_process_refuses_several_once(monkeypatch):
    assert n_processes() == 1
    one_process_only("a sweep")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launcher() == ["torchrun", "--nnodes=2", "--nproc_per_node=2"]
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="a sweep runs in one process and 4 were started"):
        one_process_only("a sweep")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stop:
        one_process_only("a sweep")
    assert stop.value.code == 2
    monkeypatch.setenv("WORLD_SIZE", "some")
    with pytest.raises(UserError, match="WORLD_SIZE is 'some'"):
        n_processes()


def test_parts_of_processes_are_all_there_once():
    for n in (7, 8, 64):
        for size in (1, 2, 3, 8):
            found = []
            for rank in range(size):
                process = Processes()
                process.rank, process.size = rank, size
                found += range(n)[process.own(n)]
            assert found == list(range(n))


def test_one_process_imports_nothing_of_several(tmp_path):
    config = runs.config_file(tmp_path, max_steps=1, eval_interval=1)
    program = (
        "import runpy, sys; sys.argv = ['train.py', '--config', sys.argv[1]];"
        "runpy.run_path('train.py', run_name='__main__');"
        "print('MODULES', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(config)],
        capture_output=True,
        encoding="utf-8",
        cwd=runs.ROOT,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("MODULES"))
    ours = {"process_group", "parallelize", "sharded_checkpoint"}
    assert not {f"wavelet_lm.training.{name}" for name in ours} & set(line.split())
