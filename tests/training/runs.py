"""Small runs for the tests: a text, a config that trains on it in a moment, the command."""

import contextlib
import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open

from tests.conftest import tiny_config
from wavelet_lm.config import Config

ROOT = Path(__file__).parents[2]
WORDS = ("a", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs")
SMALL = {
    "layers": 2,
    "levels": 2,
    "block_size": 16,
    "mlp_expansion": 1,
    "per_scale_mixer_widths": (1, 1, 0.5),
    "pkm_top_k": 2,
    "fwpkm_enabled": False,
    "tokenizer": "char",
    "micro_batch_size": 2,
    "lr": 0.01,
    "warmup_fraction": 0.1,
    "max_steps": 40,
    "eval_interval": 10,
    "eval_batches": 2,
    "save_interval": 10,
    "log_interval": 1,
    "device": "cpu",
    "num_new_tokens": 5,
    "generation_prompt": "a",
    "loss_plot": False,
}


def some_text(n_words: int = 800, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def run_config(folder: Path, **overrides) -> Config:
    """A config whose text, cache, run folders and table all lie in `folder`."""
    text = folder / "words.txt"
    if not text.exists():
        text.write_text(some_text(), encoding="utf-8")
    places = {
        "dataset": str(text),
        "cache_dir": str(folder / "cache"),
        "out_dir": str(folder / "logs"),
        "runs_file": str(folder / "runs.md"),
    }
    return tiny_config(**{**SMALL, **places, **overrides})


def config_file(folder: Path, **overrides) -> Path:
    path = folder / "small.json"
    path.write_text(run_config(folder, **overrides).to_json(), encoding="utf-8")
    return path


def command(*arguments, script: str = "train.py") -> subprocess.Popen:
    """`python train.py …` from the repository's root, with one thread as in this process."""
    start = ["-m", script] if script.startswith("wavelet_lm") else [str(ROOT / script)]
    return subprocess.Popen(
        [sys.executable, *start, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )


def finished(*arguments, script: str = "train.py") -> subprocess.CompletedProcess:
    process = command(*arguments, script=script)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def error_line(*arguments, script: str = "train.py") -> str:
    """The one line of a command that ends with a user's error, and prints nothing else there.

    The script runs in this process: starting Python and PyTorch takes longer than all the rest.
    """
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    folder = Path.cwd()
    with (
        mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as stop,
    ):
        try:
            os.chdir(ROOT)
            runpy.run_path(str(ROOT / script), run_name="__main__")
        finally:
            os.chdir(folder)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
    stderr.seek(0)
    line = stderr.read()
    assert stop.value.code == 2
    assert line.startswith(f"{script}: error: ")
    assert line.count("\n") == 1, line
    return line


def only_run(folder: Path) -> Path:
    (run,) = (folder / "logs").iterdir()
    return run


def figures(run: Path) -> list[dict]:
    """What a run computed: its train and eval lines without the times."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {
            key: value
            for key, value in row.items()
            if key not in ("tokens_per_second", "seconds", "memory_bytes")
        }
        for row in rows
        if row["event"] in ("train", "eval")
    ]


def tensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(file), framework="pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit the same losses, weights, optimizer and generator states."""
    assert figures(a) == figures(b)
    for name in ("last.safetensors", "best.safetensors"):
        left, right = tensors(a / name), tensors(b / name)
        assert left.keys() == right.keys()
        different = [key for key in left if not torch.equal(left[key], right[key])]
        assert not different, name
