"""The estimate of training's memory against what training takes, for every way to take less.

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py --config config.json --device cuda --vocab_size 50257

Each row is a process of its own that trains a few steps on synthetic tokens, as training.py does,
first of a tiny model, so that code and libraries' buffers are there, then of the one in question.
It reports the most memory that it had above what it had in between: resident, as the system counts
it, or on CUDA what PyTorch had allocated. On a CPU the C library is told to give back what is freed
(MALLOC_MMAP_THRESHOLD_): left alone, its heap keeps holes beside what is held. Results go to
`--json FILE`, by convention `benchmarks/results/training_memory_<machine>.json`.
"""

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import check_targets, write_results
from training import trained

from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.config import Config
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.models.registry import n_params

# 15 million parameters whose activations weigh more than they do, so that each option shows.
SIZES = {"C": 256, "layers": 4, "mlp_expansion": 8, "pkm_num_keys": 4096, "fwpkm_enabled": False}
SIZES |= {"micro_batch_size": 4, "block_size": 256, "optimizer_eps": 1e-8, "tokenizer": "bytes"}
WARM = {"C": 64, "micro_batch_size": 1, "block_size": 64, "heads": 1}
RUN = {
    "eval_batches": 1,
    "save_interval": 1000,
    "eval_interval": 1000,
    "threads": 1,
    "log_interval": 1,
}
ALONE = {"optimizer_in_backward": True, "grad_clip": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "AdamW": {"optimizer": "AdamW"},
    "AdamW in 8 bits": {"optimizer": "AdamW8bit"},
    "Muon": {"optimizer": "Muon"},
    "two micro-batches": {"grad_accum": 2},
    "blocks recomputed": {"gradient_checkpointing": True},
    "two blocks recomputed": {"gradient_checkpointing": 2},
    "in backward": ALONE,
    "in backward, recomputed": {**ALONE, "gradient_checkpointing": True},
    "in backward, 8 bits": {**ALONE, "gradient_checkpointing": True, "optimizer": "Adagrad8bit"},
    "bfloat16": {"amp_dtype": "bf16"},
}
ON_A_GPU = {"offloaded": {"optimizer_offload": True}}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", metavar="FILE", help="[a model of 15 million parameters]")
    parser.add_argument("--vocab_size", type=int, default=4096, help="[4096]")
    parser.add_argument("--device", default="cpu", help="[cpu]")
    parser.add_argument("--steps", type=int, default=2, help="[2]")
    parser.add_argument("--rows", help="some of the rows, apart by semicolons [all]")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # a row, in this process
    args = parser.parse_args()
    known = ROWS | (ON_A_GPU if args.device != "cpu" else {})
    names = list(known) if args.rows is None else args.rows.split(";")
    for name in filter(lambda name: name not in known, names):
        raise UserError(f"--rows has {name!r}; it must be of {'; '.join(known)}")
    if args.here:
        print(json.dumps(take(known[args.here], args)))
        return
    check_targets([args.json])
    rows = []
    for name in names:
        rows.append(row := {"options": name, **apart(name)})
        print(
            f"{name}: {row['estimated_GiB']:.3f} GiB said, {row['peak_GiB']:.3f} GiB taken,"
            f" {row['error']:+.1%}",
            flush=True,
        )
    if args.json:
        write_results(args.json, rows)


def apart(name: str) -> dict[str, Any]:
    """`take` in a process of its own, with the options of this command."""
    command = [sys.executable, __file__, *sys.argv[1:], "--here", name]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **GIVE_BACK})
    if done.returncode:
        raise UserError(f"{name} failed: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def take(options: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A run as in benchmarks/training.py with these options, and how far its estimate was off."""
    values = json.loads(Path(args.config).read_text("utf-8")) if args.config else SIZES
    values = {**values, **RUN, "max_steps": args.steps, "device": args.device, **options}
    trained(Config.from_dict({**values, **WARM}), args.vocab_size)
    run = trained(Config.from_dict(values), args.vocab_size)
    memory = run.memory()
    return {
        "parameters": n_params(run.model),
        "dtype": str(run.trainer.precision.dtype).removeprefix("torch."),
        **memory,
        "error": round(memory["estimated_GiB"] / memory["peak_GiB"] - 1, 4),
        "changed": options,
    }


if __name__ == "__main__":
    run_command(main)
