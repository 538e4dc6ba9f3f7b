"""Training steps of several checkouts of this project, in turns: CPU time of a step, and losses.

    git worktree add /tmp/before COMMIT
    python benchmarks/checkouts.py /tmp/before . --config configs/quickstart.json --compile

A process for each checkout, with its code alone, one thread and the same weights and tokens, takes
some steps, then the next one does. CPU time and not that of a clock, so that other programs on the
machine matter little; what they leave is noise, which the turns share out. A process may be a
twentieth slower than its twin as long as it lives: so all are started anew some times, and a ratio
stands beside the least and largest of the starts. One commit in two folders shows what is noise.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from report import alternate, check_targets, median, positive, table, write_results

from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.config import read_json_object
from wavelet_lm.errors import UserError, run_command

WORKER = Path(__file__).with_name("checkout_steps.py")
N_WARM = 3  # steps that compile, and make the optimizer's state


class Checkout:
    """The steps of one checkout, in a process of its own."""

    def __init__(self, folder: str, config: str, vocab_size: int, mode: str):
        self.folder, self.losses = folder, []
        self._process = subprocess.Popen(
            [sys.executable, WORKER, config, str(vocab_size), mode],
            env={**os.environ, "PYTHONPATH": str(Path(folder).resolve()), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def steps(self, n: int) -> list[float]:
        """Seconds of CPU time of each of n more steps, whose losses are kept."""
        print(n, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise UserError(f"{self.folder} did not take a step; its message stands above")
        seconds, losses = json.loads(answer)
        self.losses += losses
        return seconds


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="+", metavar="FOLDER")
    parser.add_argument("--config", required=True, metavar="FILE", help="for all of them")
    parser.add_argument("--vocab_size", type=positive, default=256)
    parser.add_argument("--starts", type=positive, default=5, help="of the processes")
    parser.add_argument("--turns", type=positive, default=2, help="of a start")
    parser.add_argument("--steps", type=positive, default=8, help="of a turn")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args()
    check_targets([args.json])
    read_json_object(args.config)  # refused here rather than by every process
    for folder in args.checkouts:
        if not (Path(folder) / "wavelet_lm").is_dir():
            raise UserError(f"{folder} is no checkout of this project: it has no wavelet_lm/")
    rows = measure(args)
    cells = [[row["checkout"], *(f"{row[key]:,.4g}" for key in list(row)[1:])] for row in rows]
    print(table(list(rows[0]), cells))
    if args.json:
        write_results(args.json, rows)


def measure(args: Any) -> list[dict[str, Any]]:
    """A row for each checkout; ratios and losses are against the first one's."""
    samples: dict[str, list[list[float]]] = {folder: [] for folder in args.checkouts}
    losses: dict[str, list[float]] = {folder: [] for folder in args.checkouts}
    for start in range(args.starts):
        with ExitStack() as stack:
            checkouts = started(args, stack, in_reverse=start % 2 == 1)
            of_start = alternate(
                {c.folder: lambda c=c: [median(c.steps(args.steps))] for c in checkouts}, args.turns
            )
            for checkout in checkouts:
                samples[checkout.folder].append(of_start[checkout.folder])
                losses[checkout.folder] = checkout.losses
    first = args.checkouts[0]
    every = {folder: list(chain.from_iterable(samples[folder])) for folder in args.checkouts}
    return [
        {
            "checkout": folder,
            "median_ms": 1e3 * median(every[folder]),
            "least_ms": 1e3 * min(every[folder]),
            **ratios(samples[folder], samples[first]),
            "largest_difference_of_losses": max(
                abs(a - b) for a, b in zip(losses[folder], losses[first], strict=True)
            ),
        }
        for folder in args.checkouts
    ]


def started(args: Any, stack: ExitStack, *, in_reverse: bool) -> list[Checkout]:
    """A process for each checkout, one after another, that has taken its first steps."""
    mode = "compiled" if args.compile else "eager"
    config = str(Path(args.config).resolve())
    checkouts = []
    for folder in args.checkouts[:: -1 if in_reverse else 1]:
        checkouts.append(stack.enter_context(Checkout(folder, config, args.vocab_size, mode)))
        checkouts[-1].steps(N_WARM)
    return checkouts


def ratios(samples: list[list[float]], first: list[list[float]]) -> dict[str, float]:
    """Of the samples of every start to those of the first checkout: median, least, largest."""
    of_starts = [
        median([a / b for a, b in zip(*of_start, strict=True)])
        for of_start in zip(samples, first, strict=True)
    ]
    return {
        "ratio": median(of_starts),
        "least_ratio": min(of_starts),
        "largest_ratio": max(of_starts),
    }


if __name__ == "__main__":
    run_command(main)
