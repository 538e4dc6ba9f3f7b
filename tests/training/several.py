"""Several processes that train: started, waited for, ended, all on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.training.runs import ROOT, only_run, run_config
from wavelet_lm.config import Config
from wavelet_lm.errors import Interrupted
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.processes import ALONE, Processes
from wavelet_lm.training.run import resume, train
from wavelet_lm.training.together import together

DROPOUTS = ("embedding", "mixer", "projection", "mlp", "lm_head")
PLAIN = {
    "micro_batch_size": 4,
    "grad_accum": 2,
    "save_interval": 1000,
    "num_new_tokens": 1,
    "optimizer_eps": 1e-8,
    **{f"dropout_{name}": 0.0 for name in DROPOUTS},
}
PATIENCE = 1800  # seconds; a test that waits longer has found a hang


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def started(size: int, *command: Any) -> Iterator[list[subprocess.Popen]]:
    """The processes of `python …`, one for each rank, ended when the block ends."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    place |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "LOCAL_WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Status, standard output and standard error of each, when all have ended."""
    results = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=PATIENCE)
        results.append((process.returncode, stdout, stderr))
    return results


@contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Inside, models are made and computed in a dtype, `float32` or `float64`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def train_together(size: int, folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Train or resume several runs one after the other, all in one group of processes.

    Each job has `config`, or `resume` and `flags`; `stop` ends it before that step, as a signal;
    `dtype` is float32 where it has none.
    """
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    with started(size, "-m", "tests.training.several", file) as processes:
        for status, _, stderr in ended(processes):
            assert status == 0, stderr


def job(folder: Path, steps: int, **overrides) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    lengths = {"max_steps": steps, "eval_interval": max(1, steps // 2)}
    return {"config": run_config(folder, **{**PLAIN, **lengths, **overrides}).to_dict()}


def go_on(folder: Path, kind: str, stop: int | None = None, dtype: str = "float32") -> dict:
    """A job that resumes the run of a folder."""
    run = str(only_run(folder))
    return {"resume": run, "flags": {"parallel": kind}, "stop": stop, "dtype": dtype}


def run_job(job: dict[str, Any], processes: Processes = ALONE) -> None:
    """Train or resume as a job says; what stops it is in the first process alone."""
    update, stop = Trainer._update, job.get("stop")

    def stopping(trainer: Trainer) -> None:
        if trainer.progress.step == stop and processes.is_main:
            trainer._signals.received = signal.SIGTERM
        update(trainer)

    dtype = job.get("dtype", "float32")
    with mock.patch.object(Trainer, "_update", stopping), computing_in(dtype):
        try:
            if "resume" in job:
                resume(job["resume"], job.get("flags"), processes)
            else:
                train(Config.from_dict(job["config"], "a job"), processes=processes)
        except Interrupted:
            assert stop is not None
    processes.wait_for_all()


def main() -> None:
    with together() as processes:
        for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
            run_job(job, processes)


if __name__ == "__main__":
    main()
