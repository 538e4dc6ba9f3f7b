"""Training speed beside other busy processes, by how threads wait and how many there are.

    python benchmarks/shared_machine.py --json benchmarks/results/shared_machine_cpu.json
    python benchmarks/shared_machine.py --settings ours,spin:3000,one --busy 0,3 --repeats 9

A setting is a process that trains the config on random tokens: `ours` as the project's commands
wait, `spinning` as libgomp waits by itself, `sleeping` at once, `one` with one thread, `spin:N`
with GOMP_SPINCOUNT N. They take turns of some seconds, each beside the same number of busy
processes, which this program starts and ends; the others sleep meanwhile. The fair share of n
threads beside m busy processes on c CPUs is that of c·n / (n + m) CPUs where that is less than n.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from report import alternate, check_targets, median, naturals, positive, table, write_results

from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.config import Config
from wavelet_lm.environment import COUNT_VARIABLES, WAIT_VARIABLES, available_cpus
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.models.registry import build_model
from wavelet_lm.threads import use_threads

CONFIG = "configs/quickstart.json"
VOCAB_SIZE = 256
LIBGOMP_SPINS = "300000"  # what it spins for where nothing is set
SETTINGS: dict[str, dict[str, str]] = {
    "ours": {},
    "spinning": {"GOMP_SPINCOUNT": LIBGOMP_SPINS},
    "sleeping": {"OMP_WAIT_POLICY": "passive"},
    "one": {"OMP_NUM_THREADS": "1"},
}
BUSY = [sys.executable, "-c", "import os\nwhile os.getppid() == {parent}: pass"]


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", default=CONFIG, metavar="FILE", help=f"what to train [{CONFIG}]")
    add("--settings", default=",".join(SETTINGS), metavar="LIST", help="[%(default)s]")
    add("--busy", type=naturals, default=(0, 1, 2, 4), metavar="LIST", help="processes [0,1,2,4]")
    add("--seconds", type=float, default=3.0, metavar="X", help="of a turn [3]")
    add("--repeats", type=positive, default=7, metavar="N", help="turns of each [7]")
    add("--json", metavar="FILE", help="write the results there")
    add("--worker", action="store_true", help="be one of the processes that train")
    args = parser.parse_args()
    if not 0 < args.seconds <= 600:
        raise UserError(f"--seconds is {args.seconds:g}; it must be above 0 and at most 600")
    config = Config.from_json(args.config, device="cpu")
    if args.worker:
        work(config)
        return
    check_targets([args.json])
    settings = {name: variables_of(name) for name in args.settings.split(",")}
    rows = measure(args.config, settings, args.busy, args.seconds, args.repeats)
    print(report(rows))
    if args.json:
        write_results(
            args.json,
            rows,
            config=args.config,
            cpus=available_cpus(),
            seconds=args.seconds,
            repeats=args.repeats,
        )


def variables_of(setting: str) -> dict[str, str]:
    """What the environment of a setting's process has.

    Raises:
        UserError: there is no such setting.
    """
    kind, _, count = setting.partition(":")
    if kind == "spin" and count.isdecimal():
        return {"GOMP_SPINCOUNT": count}
    if setting not in SETTINGS:
        raise UserError(f"--settings has {setting!r}; it may have {', '.join(SETTINGS)}, spin:N")
    return SETTINGS[setting]


# --- the processes -------------------------------------------------------------------------------


def work(config: Config) -> None:
    """Train for as many seconds as each line of standard input says, and print tokens/s."""
    use_threads(config.threads)
    torch.manual_seed(0)
    model = build_model(config, VOCAB_SIZE)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(VOCAB_SIZE, (config.micro_batch_size, config.block_size + 1))

    def step() -> None:
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # sets up what later steps reuse
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        started, n = time.perf_counter(), 0
        while time.perf_counter() - started < float(line):
            step()
            n += 1
        print(n * tokens[:, 1:].numel() / (time.perf_counter() - started), flush=True)


class Worker:
    """A process that trains while it is asked to."""

    def __init__(self, config: str, variables: Mapping[str, str], stack: ExitStack):
        ours = (*WAIT_VARIABLES, *COUNT_VARIABLES)
        clean = {name: value for name, value in os.environ.items() if name not in ours}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", "--config", config],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="ascii",
            env={**clean, **variables},
        )
        stack.enter_context(ended(self.process))
        self.threads = int(self._answer())

    def tokens_per_second(self, seconds: float) -> float:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise UserError("a process that trains has ended; its reason stands above")
        return line


@contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """End a process with the block, however that ends."""
    try:
        yield
    finally:
        process.kill()
        process.communicate()


@contextmanager
def busy(n: int) -> Iterator[None]:
    """So many processes beside this one that always have something to do, and end with it."""
    command = [part.replace("{parent}", str(os.getpid())) for part in BUSY]
    with ExitStack() as stack:
        for _ in range(n):
            stack.enter_context(ended(subprocess.Popen(command)))
        yield


# --- what is measured ----------------------------------------------------------------------------


def measure(
    config: str,
    settings: Mapping[str, Mapping[str, str]],
    busies: Sequence[int],
    seconds: float,
    repeats: int,
) -> list[dict[str, Any]]:
    """A row for each number of busy processes and setting: the median and all turns."""
    rows = []
    with ExitStack() as stack:
        workers = {name: Worker(config, extra, stack) for name, extra in settings.items()}
        for n in busies:
            with busy(n):
                turns = alternate(
                    {
                        name: lambda worker=worker: [worker.tokens_per_second(seconds)]
                        for name, worker in workers.items()
                    },
                    repeats,
                )
                load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            rows += [
                {
                    "busy": n,
                    "setting": name,
                    "threads": workers[name].threads,
                    "tokens_per_second": round(median(speeds), 1),
                    "turns": [round(speed, 1) for speed in speeds],
                    "load_average": None if load is None else round(load, 2),
                }
                for name, speeds in turns.items()
            ]
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tokens/s by busy processes and setting, and what of those alone is left."""
    cpus = available_cpus()
    alone = {row["setting"]: row["tokens_per_second"] for row in rows if row["busy"] == 0}
    lines = []
    for row in rows:
        n, m, speed = row["threads"], row["busy"], row["tokens_per_second"]
        own = alone.get(row["setting"])
        share = min(1, cpus / (n + m))
        cells = [row["setting"], n, m, f"{speed:,.0f}", f"{speed / own:.0%}" if own else None]
        lines.append([*cells, f"{share:.0%}", row["load_average"]])
    head = ["setting", "threads", "busy", "tokens/s", "of alone", "fair share", "load average"]
    return table(head, lines)


if __name__ == "__main__":
    run_command(main)
