"""Which model is best after equal time: a table that anyone can make again.

    python benchmarks/leaderboard.py --corpus data/books --tokenizer bytes --context 256 \\
        --minutes 20 --trial_minutes 3 --lrs 1e-3,3e-3,6e-3 --optimizers AdamW,Muon --seeds 0,1,2 \\
        --jobs 2 --compile --json FILE --plot FILE.png

Every row is a model of equal size (`leaderboard_models.py`), trained on the same windows for the
same time: on a CPU that of its process, with one thread. The learning rate warms up and falls by
the part of the time that is spent, whatever number of steps that turns out to be. First the same
sweep for every row, each trial a shorter run of the first seed; the setting with the lowest
validation loss at its end is then trained for the whole time with every seed, and reads the test
split once. Short trials favour high rates: with --finalists 2 the two best settings of every row
are trained for the whole time, and the validation loss at its end decides between them. With
--flops there is a second table, for equal FLOPs of matrix products.

Every finished run is kept in the JSON file at once; started again, the program goes on with what is
missing there, and so do more rows, seeds or rates. A row of a table is the mean of all seeds that
the file has. A row may be changed: efficient+levels=3.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import argparse
import itertools
import json
import math
import multiprocessing
import signal
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from leaderboard_models import BAND, ROWS, SIZE, build_row, check_size, find_row
from leaderboard_trial import Settings, Trial, check_data, run_trial
from report import check_plot, check_targets, natural, naturals, positive, positives, write_results

from wavelet_lm.atomic_files import atomic_path, write_text
from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.config import Config, parse_value
from wavelet_lm.data.dataset import TokenizedText, prepare_data
from wavelet_lm.errors import Interrupted, UserError, run_command
from wavelet_lm.experiments.model_names import split_names
from wavelet_lm.json_files import read_json
from wavelet_lm.training.memory_estimate import GiB
from wavelet_lm.training.optimizers import STATE_NUMBERS

Record = dict[str, Any]


# --- what is kept --------------------------------------------------------------------------------


class Store:
    """Finished runs by their keys, in a file where there is one.

    Programs may share a file: each adds what it has finished to what is there.

    Raises:
        UserError: the file is of other settings.
    """

    def __init__(self, path: str | None, settings: Record, summarise: Callable[[Store], Any]):
        self.path, self.settings, self.summarise = path, settings, summarise
        self.runs: dict[str, Record] = {}
        self.reload()

    def reload(self) -> None:
        """Read what others have added."""
        if self.path is None or not Path(self.path).exists():
            return
        kept = read_json(self.path)
        if not isinstance(kept, dict) or not isinstance(kept.get("runs"), dict):
            raise UserError(f"{self.path}: no results of a leaderboard; give --json another name")
        for key, value in self.settings.items():
            if kept.get("settings", {}).get(key) != value:
                raise UserError(
                    f"{self.path}: made with {key} {kept.get('settings', {}).get(key)!r}, not"
                    f" {value!r}; give the same, or --json another name"
                )
        self.runs = kept["runs"]

    def add(self, key: str, record: Record) -> None:
        """Keep one more run, beside whatever the file has by now."""
        if self.path is None:
            self.runs[key] = record
            return
        with FileLock(f"{self.path}.lock"):
            self.reload()
            self.runs[key] = record
            about = {"settings": self.settings, "runs": self.runs}
            write_results(self.path, self.summarise(self), **about)


# --- what is to be done --------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """kind: `seconds` or `flops`; amount: of a run; trial: of a run of the sweep."""

    kind: str
    amount: float
    trial: float

    def text(self, amount: float) -> str:
        """An amount in a unit for people."""
        return f"{amount / 60:g} minutes" if self.kind == "seconds" else f"{amount:g}"


@dataclass(frozen=True)
class Plan:
    """All runs that a table needs."""

    rows: tuple[str, ...]
    budgets: tuple[Budget, ...]
    optimizers: tuple[str, ...]
    lrs: tuple[float, ...]
    batches: tuple[int, ...]
    seeds: tuple[int, ...]
    recall_steps: int | None = None
    finalists: int = 1

    def grid(self) -> list[tuple[str, float, int]]:
        return list(itertools.product(self.optimizers, self.lrs, self.batches))

    def sweep(self, row: str, budget: Budget) -> list[Trial]:
        """The trials of a row; none where there is nothing to choose."""
        if len(self.grid()) == 1:
            return []
        common = (row, budget.kind, budget.trial)
        return [Trial(*common, *setting, self.seeds[0], False) for setting in self.grid()]

    def whole(self, row: str, budget: Budget, setting: Setting) -> list[Trial]:
        """The whole runs of a row at a setting, one for each seed."""
        common = (row, budget.kind, budget.amount)
        return [Trial(*common, *setting, seed, True) for seed in self.seeds]

    def candidates(self, row: str, budget: Budget, runs: dict[str, Record]) -> list[Setting]:
        """The `finalists` best settings of a row by its trials; none while some are missing."""
        trials = self.sweep(row, budget)
        if not trials:
            return self.grid()
        return _best_first(trials, runs)[: self.finalists] if _all_ran(trials, runs) else []

    def deciding(self, row: str, budget: Budget, runs: dict[str, Record]) -> list[Trial]:
        """The whole runs, of the first seed, that decide between the candidates of a row."""
        candidates = self.candidates(row, budget, runs)
        return [self.whole(row, budget, setting)[0] for setting in candidates]

    def counted(self, row: str, budget: Budget, runs: dict[str, Record]) -> list[Trial]:
        """The whole runs of a row's best candidate so far."""
        settings = self.candidates(row, budget, runs)
        if len(settings) > 1:
            settings = _best_first(self.deciding(row, budget, runs), runs)
        return self.whole(row, budget, settings[0]) if settings else []

    def finals(self, row: str, budget: Budget, runs: dict[str, Record]) -> list[Trial]:
        """The whole runs of a row: with the first seed of all candidates, then of the best."""
        deciding = self.deciding(row, budget, runs)
        decided = len(deciding) == 1 or _all_ran(deciding, runs)
        return deciding + (self.counted(row, budget, runs)[1:] if decided else [])

    def jobs(self, runs: dict[str, Record]) -> list[Trial]:
        """What can be run now and is not in `runs`, in turns over the rows.

        So a machine that gets slower or faster on the way does so for all of them alike.
        """
        found = []
        for budget in self.budgets:
            for part in (
                [self.sweep(row, budget) for row in self.rows],
                [self.finals(row, budget, runs) for row in self.rows],
            ):
                turns = itertools.zip_longest(*part)
                found += [trial for turn in turns for trial in turn if trial is not None]
        turns = itertools.zip_longest(*(self.recalls(row) for row in self.rows))
        found += [trial for turn in turns for trial in turn if trial is not None]
        return [trial for trial in found if key_of(trial) not in runs]

    def recalls(self, row: str) -> list[Trial]:
        """Trainings on multi-query recall, one for each rate."""
        if self.recall_steps is None:
            return []
        common = (row, "recall", self.recall_steps, "AdamW")
        return [Trial(*common, lr, RECALL_BATCH, self.seeds[0], False) for lr in self.lrs]

    def n_runs(self) -> int:
        grid = len(self.grid())
        per_row = (grid if grid > 1 else 0) + min(self.finalists, grid) + len(self.seeds) - 1
        recalls = sum(len(self.recalls(row)) for row in self.rows)
        return per_row * len(self.rows) * len(self.budgets) + recalls


Setting = tuple[str, float, int]
RECALL_BATCH = 16


def _all_ran(trials: Sequence[Trial], runs: dict[str, Record]) -> bool:
    return all(key_of(trial) in runs and "failed" not in runs[key_of(trial)] for trial in trials)


def _best_first(trials: Sequence[Trial], runs: dict[str, Record]) -> list[Setting]:
    """The settings of those that ran to their end, by their last validation loss."""
    ended = [(runs[key_of(t)].get("valid_bits_per_byte"), t) for t in trials if key_of(t) in runs]
    ranked = sorted((pair for pair in ended if pair[0] is not None), key=lambda pair: pair[0])
    return [(t.optimizer, t.lr, t.batch) for _, t in ranked]


def key_of(trial: Trial) -> str:
    """Names a run in the file; that of a row which has changed since is another."""
    parts = (
        trial.row,
        find_row(trial.row).digest,
        f"{trial.kind}:{trial.amount:g}",
        trial.optimizer,
        f"lr {trial.lr:g}",
        f"batch {trial.batch}",
        f"seed {trial.seed}",
        "whole" if trial.final else "trial",
    )
    return " | ".join(parts)


# --- doing it ------------------------------------------------------------------------------------


def work(
    plan: Plan,
    settings: Settings,
    data: TokenizedText,
    store: Store,
    jobs: int,
    log: Callable[[str], None],
) -> None:
    """Run what is missing, `jobs` at a time, each in a process of its own; 0 = in this one.

    What fails is tried once, and kept out of the file: the next start tries it again.
    """
    failed: set[str] = set()

    def missing(busy: Collection[str] = ()) -> list[Trial]:
        store.reload()
        keys = failed.union(busy)
        return [trial for trial in plan.jobs(store.runs) if key_of(trial) not in keys]

    def finished(trial: Trial, record: Record) -> None:
        if "failed" in record:
            failed.add(key_of(trial))
        else:
            store.add(key_of(trial), {**trial.about(), **record})
        log(line_of(trial, record))

    if jobs == 0:
        while found := missing():
            finished(found[0], attempt(found[0], settings, data))
        return
    running: dict[Any, tuple[Any, Trial, Path]] = {}  # by what tells that a process has ended
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()
        try:
            while True:
                busy = {key_of(trial) for _, trial, _ in running.values()}
                for trial in missing(busy)[: jobs - len(running)]:
                    path = Path(folder) / f"{next(numbers)}.json"
                    process = start_process(trial, settings, path)
                    running[process.sentinel] = (process, trial, path)
                if not running:
                    return
                for sentinel in wait(list(running)):
                    process, trial, path = running.pop(sentinel)
                    process.join()
                    finished(trial, outcome(process, path))
        finally:
            for process, _, _ in running.values():
                process.terminate()
                process.join()


def start_process(trial: Trial, settings: Settings, path: Path) -> Any:
    """A process that runs a trial and leaves what came of it in a file."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=in_process, args=(trial, settings, str(path)), daemon=True)
    process.start()
    return process


def in_process(trial: Trial, settings: Settings, path: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    data = prepare_data(settings.config(), log=lambda line: None)
    write_text(path, json.dumps(attempt(trial, settings, data)))


def outcome(process: Any, path: Path) -> Record:
    if not path.exists():
        return {"failed": f"its process ended with status {process.exitcode}"}
    return read_json(path)


def attempt(trial: Trial, settings: Settings, data: TokenizedText) -> Record:
    """The record of a trial; what fails is a record too, and the others go on."""
    try:
        return run_trial(trial, settings, data)
    except UserError as error:
        return {"failed": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def line_of(trial: Trial, record: Record) -> str:
    unit = {"seconds": "s", "flops": "FLOPs", "recall": "steps of recall"}[trial.kind]
    what = f"{trial.row}, {trial.optimizer} {trial.lr:g}, batch {trial.batch}, seed {trial.seed},"
    what += f" {trial.amount:g} {unit}:"
    for word in ("failed", "diverged"):
        if word in record:
            return f"{what} {word}: {record[word]}"
    if trial.kind == "recall":
        return f"{what} {record['test_accuracy']:.1%} right"
    what += f" valid {record['valid_bits_per_byte']:.4f} bits/byte"
    if "test" in record:
        what += f", test {record['test']['sliding']:.4f}"
    return f"{what}, {record['tokens_per_second']:,.0f} tokens/s"


# --- results -------------------------------------------------------------------------------------


def whole_runs(runs: dict[str, Record]) -> dict[tuple[str, float, str], list[Record]]:
    """By kind, amount and row, what a row of a table is the mean of, whatever command ran it.

    They are the whole runs, by seed, of the setting with the lowest last validation loss of a first
    seed. Runs of a row that has changed since are left out.
    """
    found: dict[tuple[str, float, str], dict[Setting, list[Record]]] = {}
    for run in sorted(_of_rows_as_they_are(runs), key=lambda run: run["seed"]):
        if run["final"]:
            settings = found.setdefault((run["kind"], run["amount"], run["row"]), {})
            settings.setdefault((run["optimizer"], run["lr"], run["batch"]), []).append(run)

    def loss_of_first(of_setting: list[Record]) -> float:
        return of_setting[0].get("valid_bits_per_byte", math.inf)

    return {place: min(settings.values(), key=loss_of_first) for place, settings in found.items()}


def _of_rows_as_they_are(runs: dict[str, Record]) -> list[Record]:
    trials = {field.name for field in fields(Trial)}

    def is_current(key: str, run: Record) -> bool:
        try:
            return key == key_of(Trial(**{name: run[name] for name in trials}))
        except UserError:  # there is no such row any more
            return False

    return [run for key, run in runs.items() if is_current(key, run)]


def summary(runs: dict[str, Record]) -> list[Record]:
    """A record per budget and row that has at least one whole run that ended, the best first."""
    current, rows = _of_rows_as_they_are(runs), []
    for (kind, amount, row), whole in whole_runs(runs).items():
        ended = [run for run in whole if "diverged" not in run]
        if ended:
            own = [run for run in current if run["row"] == row]
            rows.append(
                {
                    "row": row,
                    "kind": kind,
                    "amount": amount,
                    **_means(ended),
                    "at_the_edge": _is_at_the_edge(ended[0], own),
                    "diverged": len(whole) - len(ended),
                    "recall": _recall(own),
                }
            )
    return sorted(rows, key=lambda row: (row["kind"] != "seconds", row["amount"], row["sliding"]))


def _is_at_the_edge(chosen: Record, runs: Sequence[Record]) -> bool:
    """Whether a better rate than the chosen run's may lie outside of those that were tried."""
    alike = [run for run in runs if all(run[k] == chosen[k] for k in ("kind", "optimizer"))]
    lrs = {run["lr"] for run in alike}
    return len(lrs) > 1 and chosen["lr"] in (min(lrs), max(lrs))


def _recall(runs: Sequence[Record]) -> float | None:
    """What is recalled after most steps, with the rate that answers most of the validation's."""
    ended = [run for run in runs if run["kind"] == "recall" and "diverged" not in run]
    best = max(ended, key=lambda run: (run["amount"], run["valid_accuracy"]), default=None)
    return None if best is None else best["test_accuracy"]


def _means(runs: Sequence[Record]) -> Record:
    """Of the whole runs of one setting, which ended."""

    def mean(values: Sequence[float | None]) -> float | None:
        return None if None in values else statistics.fmean(values)

    def spread(values: Sequence[float | None]) -> float | None:
        return None if None in values or len(values) < 2 else statistics.stdev(values)

    tests = {k: [run["test"][k] for run in runs] for k in ("sliding", "streaming")}
    return {
        "seeds": [run["seed"] for run in runs],
        "needles": _mean_needles([run["needles"] for run in runs]),
        **{key: runs[0][key] for key in ("optimizer", "lr", "batch", "n_params", "body_params")},
        **{name: mean(values) for name, values in tests.items()},
        **{f"{name}_spread": spread(values) for name, values in tests.items()},
        **{
            key: mean([run[key] for run in runs])
            for key in (
                "valid_bits_per_byte",
                "step",
                "seconds",
                "tokens",
                "flops",
                "tokens_per_second",
                "matrix_rate",
                "training_bytes",
                "decode_milliseconds",
            )
        },
    }


def _mean_needles(found: Sequence[list[Record] | None]) -> list[Record] | None:
    """Means over the seeds, by distance."""
    if None in found:
        return None
    return [
        {key: statistics.fmean(row[key] for row in rows) for key in ("distance", "again", "unseen")}
        for rows in zip(*found, strict=True)
    ]


HEAD = ("model", "parameters", "setting", "test bits/byte", "streaming", "valid", "steps")
HEAD += ("tokens", "tokens/s", "FLOPs", "memory", "ms/token", "recall", "needle near", "far")
HEAD += ("GFLOP/s of the machine",)


def table(rows: Sequence[Record], undecided: Collection[str]) -> str:
    """The rows as Markdown with aligned columns; a dash where there is no figure.

    undecided: names of rows, some of whose finalists are missing.
    """

    def plus(row: Record, key: str) -> str:
        if row[key] is None:
            return "–"
        spread = row[f"{key}_spread"]
        return f"{row[key]:.4f}" + ("" if spread is None else f" ± {spread:.4f}")

    lines = []
    for row in rows:
        memory = row["training_bytes"]
        marks = "*" * row["at_the_edge"] + "†" * (row["row"] in undecided)
        lines.append(
            (
                row["row"] + (f" ({row['diverged']} diverged)" if row["diverged"] else ""),
                f"{row['body_params']:,}",
                f"{row['optimizer']} {row['lr']:g}{marks} × {row['batch']}",
                plus(row, "sliding"),
                plus(row, "streaming"),
                f"{row['valid_bits_per_byte']:.4f}",
                f"{row['step']:,.0f}",
                f"{row['tokens'] / 1e6:,.2f} M",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['flops']:.3g}",
                "–" if memory is None else f"{memory / GiB:.2f} GiB",
                f"{row['decode_milliseconds']:.2f}",
                "–" if row["recall"] is None else f"{row['recall']:.1%}",
                *_needle_cells(row["needles"]),
                f"{row['matrix_rate']:,.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(HEAD, *lines, strict=True)]

    def padded(line: Sequence[str]) -> list[str]:
        return [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        f"| {' | '.join(line)} |" for line in (padded(HEAD), rule, *map(padded, lines))
    )


def _needle_cells(rows: Sequence[Record] | None) -> list[str]:
    """Right the second time, and without a first, near and far."""
    cells = [f"{row['again']:.0%} ({row['unseen']:.0%})" for row in rows or ()]
    return cells + ["–"] * (2 - len(cells))


def report(plan: Plan, runs: dict[str, Record]) -> str:
    """A table for each budget."""
    parts, rows = [], [row for row in summary(runs) if row["row"] in plan.rows]
    for budget in plan.budgets:
        chosen = [
            row for row in rows if (row["kind"], row["amount"]) == (budget.kind, budget.amount)
        ]
        undecided = {
            row["row"]
            for row in chosen
            if not _all_ran(plan.deciding(row["row"], budget, runs), runs)
        }
        what = "time" if budget.kind == "seconds" else "FLOPs"
        title = f"Equal {what}, {budget.text(budget.amount)} a run{_how_chosen(plan, budget)}"
        rows_of_it = table(chosen, undecided) if chosen else "no row is finished"
        parts.append(f"\n{title}:\n\n{rows_of_it}")
        if any(row["at_the_edge"] for row in chosen):
            parts.append("* the lowest or highest rate that was tried: give more --lrs")
        if undecided:
            parts.append("† whole runs of its other finalists are missing")
    return "\n".join(parts)


def _how_chosen(plan: Plan, budget: Budget) -> str:
    n = len(plan.grid())
    if n == 1:
        return ""
    words = f"; the best of {n} settings by trials of {budget.text(budget.trial)}"
    if plan.finalists > 1:
        words += f", then of {min(n, plan.finalists)} by whole runs"
    return words


def plot(path: str, plan: Plan, runs: dict[str, Record]) -> None:
    """Validation bits per byte against what is equal, a line per row and seed, and its end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure = Figure(figsize=(7.5 * len(plan.budgets), 5), layout="constrained")
    panels = figure.subplots(1, len(plan.budgets), squeeze=False)[0]
    counted = whole_runs(runs)
    for budget, panel in zip(plan.budgets, panels, strict=True):
        axis = budget.kind
        for number, row in enumerate(plan.rows):
            ended = [run for run in counted.get((axis, budget.amount, row), []) if "curve" in run]
            for run in ended:
                is_first = run is ended[0]
                panel.plot(
                    [point[axis] for point in run["curve"]],
                    [point["valid_bits_per_byte"] for point in run["curve"]],
                    color=f"C{number % 10}",
                    linestyle="-" if number < 10 else "--",
                    alpha=1 if is_first else 0.3,
                    label=f"{row}  {run['valid_bits_per_byte']:.3f}" if is_first else None,
                )
        words = "seconds of training" if axis == "seconds" else "FLOPs of matrix products"
        panel.set(xlabel=words, ylabel="validation bits per byte", xscale="log", yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.yaxis.set_major_locator(MaxNLocator(12))  # evenly spaced, also on a logarithmic axis
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter("{x:.1f}")
        if axis == "seconds":
            panel.xaxis.set_major_formatter("{x:g}")
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=120)


# --- the command ---------------------------------------------------------------------------------


def numbers(text: str) -> tuple[float, ...]:
    """Numbers above 0, separated by commas; each once."""
    return tuple(dict.fromkeys(number(part) for part in text.split(",")))


def number(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def fraction(text: str) -> float:
    """A number from 0 to below 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return value


def names(text: str) -> tuple[str, ...]:
    """Optimizers, separated by commas."""
    found = tuple(dict.fromkeys(text.split(",")))
    for name in found:
        if name not in STATE_NUMBERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(STATE_NUMBERS)}")
    return found


def parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    data = Config.__dataclass_fields__
    add("--rows", default=",".join(ROWS), metavar="LIST", help=f"of {', '.join(ROWS)} [all]")
    add(
        "--corpus",
        default="data/books",
        metavar="DATA",
        help="as --dataset of training [%(default)s]",
    )
    add("--tokenizer", default="bytes", help="bytes, sentencepiece:8000, … [%(default)s]")
    add(
        "--split",
        default="0.9,0.05,0.05",
        metavar="LIST",
        help="of data without splits [%(default)s]",
    )
    add("--context", type=positive, default=256, help="tokens of a window [%(default)s]")
    add("--minutes", type=number, metavar="X", help="of training for every run")
    add("--trial_minutes", type=number, metavar="X", help="of a run of the sweep [a sixth]")
    add("--flops", type=number, metavar="X", help="of training for every run: the second table")
    add("--trial_flops", type=number, metavar="X", help="of a run of its sweep [a sixth]")
    add(
        "--recall_steps",
        type=positive,
        metavar="N",
        help="train each row on multi-query recall as well, at every rate [no]",
    )
    add(
        "--finalists",
        type=positive,
        default=1,
        metavar="N",
        help="settings of each row, the best of its sweep, that are trained for the whole time"
        " with the first seed [%(default)s]",
    )
    add("--optimizers", type=names, default=("AdamW",), metavar="LIST", help="to try [AdamW]")
    add(
        "--lrs",
        type=numbers,
        default=(1e-3, 3e-3, 6e-3),
        metavar="LIST",
        help="highest rates to try [1e-3,3e-3,6e-3]",
    )
    add(
        "--batches",
        type=positives,
        default=(8,),
        metavar="LIST",
        help="windows of a step to try [8]",
    )
    add("--seeds", type=naturals, default=(0, 1, 2), metavar="LIST", help="of whole runs [0,1,2]")
    add("--weight_decay", type=fraction, default=0.1, metavar="X", help="of matrices [%(default)s]")
    add("--warmup", type=fraction, default=0.05, metavar="X", help="part of a run [%(default)s]")
    add(
        "--final_lr",
        type=fraction,
        default=0.1,
        metavar="X",
        help="of the highest rate, at the end [%(default)s]",
    )
    add(
        "--valid_tokens",
        type=positive,
        default=65_536,
        metavar="N",
        help="of a validation [%(default)s]",
    )
    add("--test_tokens", type=positive, metavar="N", help="read of the test split [all]")
    add(
        "--band",
        type=number,
        default=BAND,
        metavar="X",
        help=f"how far a row may be from {SIZE:,} parameters [%(default)s]",
    )
    add(
        "--jobs",
        type=natural,
        default=1,
        metavar="N",
        help="runs side by side, each in a process; 0 = none but this [%(default)s]",
    )
    add("--compile", action="store_true", help="torch.compile for all rows; not counted")
    add("--device", default="cpu", help="cpu or cuda [%(default)s]")
    add(
        "--cache_dir",
        default=data["cache_dir"].default,
        metavar="FOLDER",
        help="of encoded texts [%(default)s]",
    )
    add("--json", metavar="FILE", help="keep every run there, and go on from there")
    add("--plot", metavar="FILE", help="draw bits per byte against time there")
    return parser


def plan_of(args: argparse.Namespace) -> Plan:
    """What is to be run.

    Raises:
        UserError: there is no budget.
    """
    budgets = []
    for kind, whole, trial, unit in (
        ("seconds", args.minutes, args.trial_minutes, 60),
        ("flops", args.flops, args.trial_flops, 1),
    ):
        if whole is not None:
            budgets.append(Budget(kind, whole * unit, (trial or whole / 6) * unit))
        elif trial is not None:
            raise UserError("a sweep serves a table; give --minutes or --flops beside it")
    if not budgets:
        raise UserError("for how long? give --minutes X, --flops X or both")
    return Plan(
        tuple(split_names(args.rows)),
        tuple(budgets),
        args.optimizers,
        args.lrs,
        args.batches,
        args.seeds,
        args.recall_steps,
        args.finalists,
    )


def main() -> None:
    args = parser().parse_args()
    plan = plan_of(args)
    settings = Settings(
        dataset=args.corpus,
        tokenizer=args.tokenizer,
        context=args.context,
        split=parse_value("split", args.split),
        cache_dir=args.cache_dir,
        device=args.device,
        compile=args.compile,
        weight_decay=args.weight_decay,
        warmup=args.warmup,
        final_lr=args.final_lr,
        valid_tokens=args.valid_tokens,
        test_tokens=args.test_tokens,
        size=SIZE,
        band=args.band,
    )
    check_targets((args.json, args.plot))
    if args.plot:
        check_plot(args.plot)
    for row in plan.rows:
        with torch.device("meta"):
            check_size(row, build_row(row, 256, args.context), SIZE, args.band)
    data = prepare_data(settings.config())
    check_data(data)
    kept = asdict(settings) | {
        "split": list(settings.split),
        "vocab_size": data.tokenizer.vocab_size,
    }
    kept |= {"data": data.name, "train_tokens": data.train.key, "test": data.test.key}
    for key in ("dataset", "cache_dir", "band"):  # these change no run
        del kept[key]
    store = Store(args.json, kept, lambda store: summary(store.runs))
    print(f"{plan.n_runs()} runs, {len(plan.jobs(store.runs))} can start now", file=sys.stderr)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def conclude() -> None:
        print(report(plan, store.runs))
        if args.plot:
            plot(args.plot, plan, store.runs)

    try:
        work(plan, settings, data, store, args.jobs, log)
    except (KeyboardInterrupt, Interrupted) as stop:
        conclude()
        hint = f"; go on with the same command, for {args.json} has them" if args.json else ""
        signum = getattr(stop, "signum", signal.SIGINT)
        raise Interrupted(signum, f"stopped; finished runs are kept{hint}") from None
    conclude()


if __name__ == "__main__":
    run_command(main)
