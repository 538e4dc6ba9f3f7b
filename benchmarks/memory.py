"""Peak memory of `generate.py`, beside the weights that it reads.

    python benchmarks/memory.py --config configs/mini.json --dtypes float32,bfloat16

Makes a run with random weights of that config in a temporary folder, lets the command itself write
a few tokens with it, and reports the most memory that the process had resident, as the system
counts it. `limit` is 1.15 times the weights in the dtype and 300 MB for Python, PyTorch and the
tokenizer.
Results go to `--json FILE`, by convention `benchmarks/results/memory_<machine>.json`.
"""

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from report import check_targets, table, write_results

from wavelet_lm.config import Config, OneLineParser
from wavelet_lm.data.tokenizers import named_tokenizer
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.inference.options import DTYPES
from wavelet_lm.models.checkpoint import save_checkpoint
from wavelet_lm.models.registry import build_model, n_params

ROOT = Path(__file__).parents[1]
MB = 1e6
FACTOR, BESIDE = 1.15, 300 * MB
# Runs a command and prints the most memory that it had; a process of its own for each, since the
# system keeps one figure for all children.
MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit)
sys.stderr.buffer.write(done.stderr)
sys.exit(done.returncode)
"""


def make_run(folder: Path, config: Config, tokenizer: str) -> int:
    """A run folder with random weights; how many values they are."""
    torch.manual_seed(0)
    chosen = named_tokenizer(tokenizer)
    chosen.save(folder / "tokenizer")
    model = build_model(config, chosen.vocab_size)
    save_checkpoint(folder / "best.safetensors", model, {})
    return n_params(model)


def peak_bytes(run: Path, dtype: str, num_tokens: int) -> int:
    """Peak resident memory of `generate.py` on a run.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, "generate.py", "--checkpoint", run, "--prompt", "The history of"]
    command += ["--num_tokens", num_tokens, "--dtype", dtype, "--device", "cpu"]
    command += ["--threads", 1, "--no_record"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"generate.py failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout)


def measure(config: Config, tokenizer: str, dtypes: list[str], num_tokens: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        n = make_run(Path(folder), config, tokenizer)
        for dtype in dtypes:
            weights = n * DTYPES[dtype].itemsize
            peak = peak_bytes(Path(folder), dtype, num_tokens)
            limit = FACTOR * weights + BESIDE
            rows.append(
                {
                    "dtype": dtype,
                    "n_params": n,
                    "weight_bytes": weights,
                    "peak_bytes": peak,
                    "limit_bytes": limit,
                    "within": peak <= limit,
                }
            )
    return rows


def dtype_list(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in DTYPES:
            raise UserError(f"--dtypes has {name!r}; known are {', '.join(DTYPES)}")
    return names


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mini.json", metavar="FILE")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2 or bytes: its vocabulary [gpt2]")
    parser.add_argument("--dtypes", default="float32,bfloat16", metavar="LIST")
    parser.add_argument("--num_tokens", type=int, default=8, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    check_targets([args.json])
    if args.tokenizer not in ("gpt2", "bytes"):
        raise UserError(f"--tokenizer is {args.tokenizer!r}; it must be gpt2 or bytes")
    config, dtypes = Config.from_json(args.config), dtype_list(args.dtypes)
    rows = measure(config, args.tokenizer, dtypes, args.num_tokens)
    head = ["dtype", "weights MB", "peak MB", "limit MB"]
    cells = [
        [row["dtype"]] + [f"{row[f'{key}_bytes'] / MB:,.0f}" for key in ("weight", "peak", "limit")]
        for row in rows
    ]
    print(table(head, cells))
    if args.json:
        write_results(args.json, rows, config=args.config, tokenizer=args.tokenizer)
        print(f"written to {args.json}")


if __name__ == "__main__":
    run_command(main)
