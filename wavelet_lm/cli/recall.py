"""Can a model look up what stood in the text before, and how far back?

    python -m wavelet_lm.evaluation.recall --task mqar --model gpt,wavelet_lm --steps 1500
    python -m wavelet_lm.evaluation.recall RUN --task needle --dataset mine.txt --distances 64,1024

Three tasks train models of their own and ask them fresh questions. All models of a seed have the
same examples, and the loss counts the answers alone:

    mqar        pairs of a key and a value, then keys: the value of each (recall)
    copying     values among blanks, then marks: the values in their order (selective copying)
    induction   a mark among values, and the mark again: the value that came after it

The table has the share of right answers, the highest of the seeds less the lowest, the share where
the text is streamed in chunks, and the shares by how far behind the answer stands.

    needle      reads a trained run: a sentence of the text comes again after so many tokens

Its table has nats and the share of right tokens of the sentence the first time, again, and at the
same place of a text without the first time. Without --config the models have 2 layers of width 128.
The defaults that --help shows beside the config's keys are those of train.py.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from signal import SIGINT
from typing import Any

from wavelet_lm.cli.flags import OneLineParser, add_config_flags, listed, parse_flags
from wavelet_lm.cli.recall_plots import plot_needle, plot_tasks
from wavelet_lm.cli.task_flags import configs_of, positive
from wavelet_lm.config import Config
from wavelet_lm.data.tasks.recall import TASKS, RecallTask
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.evaluation.needle import NEEDLES, READINGS, find_in_run
from wavelet_lm.experiments.comparison import check
from wavelet_lm.experiments.model_names import SYNTAX
from wavelet_lm.experiments.recall import compare, summary
from wavelet_lm.experiments.results import IMAGES, check_plot, check_targets, write_results
from wavelet_lm.experiments.tasks import DEFAULTS as ARENA
from wavelet_lm.streams import output_is_optional
from wavelet_lm.tables import aligned
from wavelet_lm.threads import use_threads
from wavelet_lm.training.processes import one_process_only

DEFAULTS: dict[str, Any] = {
    **ARENA,
    "layers": 2,
    "C": 128,
    "levels": 6,
    "heads": 4,
    "head_hidden": 0,
    "mlp_expansion": 2,
    **{f"dropout_{place}": 0 for place in ("embedding", "mixer", "projection", "mlp")},
    "adam_betas": (0.9, 0.99),
    "lr": 3e-3,
    "min_lr": 3e-4,
    "weight_decay": 0.1,
    "warmup_fraction": 0.05,
    "micro_batch_size": 16,
    "max_steps": 1500,
    "eval_batches": 16,
}
EXAMPLES = 500
SHAPES = {name: tuple(spec.name for spec in fields(task)) for name, task in TASKS.items()}
NEEDLE = "needle"
NEEDLE_OPTIONS = ("distances", "needles")
NEEDLE_KEYS = ("dataset", "device", "threads")
TRAINING_OPTIONS = ("config", "seeds", "examples", "curriculum")


def main() -> None:
    one_process_only("recall")
    parser = OneLineParser(
        run="run folder, checkpoint file or hf://user/name, which --task needle reads",
        needs_run=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"%(prog)s --task {{{','.join(TASKS)}}} --model {SYNTAX}[,…] [--steps N]"
        " [--seeds LIST] [--json FILE] [--plot FILE] [--key value …]"
        f"\n       %(prog)s RUN --task {NEEDLE} [--dataset FILE] [--distances LIST] …",
    )
    add_flags(parser)
    flags = parse_flags(parser)
    targets = {key: flags.pop(key) for key in ("json", "plot")}
    run, task = flags.pop("checkpoint"), flags.pop("task")
    if task is None:
        raise UserError(f"which task? give --task {', '.join(TASKS)} or {NEEDLE}")
    options = {
        key: flags.pop(key)
        for keys in (*SHAPES.values(), NEEDLE_OPTIONS, TRAINING_OPTIONS)
        for key in keys
        if key in flags
    }
    _check_options(task, options)
    check_targets(targets.values())
    if targets["plot"]:
        check_plot(targets["plot"])
    if task == NEEDLE:
        _find(run, options, flags, **targets)
    elif run is not None:
        raise UserError(f"{run}: the task {task} trains models of its own; drop the run")
    else:
        _train(task, options, flags, **targets)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's own options, then those of the config, `--model` among them."""
    absent = {"default": argparse.SUPPRESS}

    def number(name: str, text: str) -> None:
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=text, **absent)

    add = parser.add_argument
    add("--task", choices=(*TASKS, NEEDLE), help="what to ask for")
    shapes = {name: asdict(task()) for name, task in TASKS.items()}
    for name, text in (
        ("pairs", "of a key and a value"),
        ("keys", "to draw the keys from"),
        ("queries", "questions of a sequence"),
        ("items", "values to copy"),
        ("values", "to draw the answers from"),
        ("length", "tokens of a sequence"),
    ):
        told = (f"{shape[name]} of {task}" for task, shape in shapes.items() if name in shape)
        default = "as many as pairs" if name == "queries" else ", ".join(told)
        number(name, f"{text} [{default}]")
    add(
        "--distances",
        metavar="LIST",
        help="tokens from a sentence to its second time [1/4 to 8 times the run's block_size, as"
        " far as the model reads]",
        **absent,
    )
    number("needles", f"sentences to try [{NEEDLES}]")
    add("--config", metavar="FILE", help="config of the models", **absent)
    for name, key in (("steps", "max_steps"), ("batch", "micro_batch_size")):
        text = f"the same as --{key} [{DEFAULTS[key]:,}]"
        add(f"--{name}", dest=key, metavar="N", help=text, **absent)
    text = "seeds to train every model with [the config's seed]"
    add("--seeds", metavar="LIST", help=text, **absent)
    number("examples", f"fresh sequences to ask at the end [{EXAMPLES}]")
    text = "begin with a 2^N-th of length, pairs, queries and items, and double them until half"
    number("curriculum", f"{text} of the steps are done [all at once]")
    add("--json", metavar="FILE", help="write the results there, after every run")
    add("--plot", metavar="FILE", help=f"draw them there ({', '.join(IMAGES)})")
    add_config_flags(parser)


def _check_options(task: str, options: dict[str, Any]) -> None:
    """Raise `UserError` for an option that is none of this task."""
    read_by = {
        **{name: (*shape, *TRAINING_OPTIONS) for name, shape in SHAPES.items()},
        NEEDLE: NEEDLE_OPTIONS,
    }
    for key in options:
        if key not in read_by[task]:
            owners = [name for name, keys in read_by.items() if key in keys]
            raise UserError(
                f"--{key} is an option of {' and '.join(owners)}, not of {task}; drop it"
            )


# --- tasks that train ----------------------------------------------------------------------------


def _train(
    name: str,
    options: dict[str, Any],
    flags: dict[str, Any],
    json: str | None,
    plot: str | None,
) -> None:
    task = TASKS[name](**{key: options[key] for key in SHAPES[name] if key in options})
    shorter = task.shorter(options.get("curriculum", 0))
    configs, seeds = what_to_train(task, options, flags)
    about = {
        "task": name,
        "shape": asdict(task),
        "chance": task.chance,
        "examples": options.get("examples", EXAMPLES),
        "seeds": seeds,
        "curriculum": options.get("curriculum", 0),
    }
    runs: list[dict[str, Any]] = []
    if json is not None:
        output_is_optional()
    print(describe(task), flush=True)

    def finished(run: dict[str, Any]) -> None:
        runs.append(run)
        if json is not None:
            write_results(json, summary(runs), **about, runs=runs)

    def conclude() -> None:
        if runs:
            print(f"\n{table(summary(runs))}")
        if runs and plot is not None:
            plot_tasks(plot, runs, summary(runs), task)

    try:
        compare(configs, task, seeds, about["examples"], shorter=shorter, finished=finished)
    except (KeyboardInterrupt, Interrupted) as stop:
        conclude()
        kept = f" and kept in {json}" if json and runs else ""
        message = f"stopped; {len(runs)} of {len(configs) * len(seeds)} runs are finished{kept}"
        raise Interrupted(getattr(stop, "signum", SIGINT), message) from None
    conclude()


def what_to_train(
    task: RecallTask, options: dict[str, Any], flags: dict[str, Any]
) -> tuple[dict[str, Config], list[int]]:
    """The config of each model by name, and the seeds.

    Raises:
        UserError: one of them is not allowed, or a model cannot be built or trained here.
    """
    if "dataset" in flags:
        raise UserError(f"the sequences of {task.name} are generated; drop --dataset")
    if "seed" in flags and "seeds" in options:
        raise UserError("--seeds decides seed; drop --seed")
    configs = {
        name: config.replace(block_size=task.length)
        for name, config in configs_of(DEFAULTS, options.get("config"), flags).items()
    }
    config = next(iter(configs.values()))
    if config.init_from:
        raise UserError("init_from is set, and these models start from random weights; drop it")
    if config.max_steps is None:
        raise UserError("there are no epochs, since examples never come twice; give --steps")
    check(configs, task.vocab_size)
    return configs, listed("seed", options.get("seeds"), config.seed)


def describe(task: RecallTask) -> str:
    """The task in a line."""
    return (
        f"{task.meaning}: {task.describe()}; {task.vocab_size} tokens, chance"
        f" {100 * task.chance:.2f}%"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `summary` with aligned columns; a dash where there is no figure."""
    farthest = sorted({int(n) for row in rows for n in row.get("by_distance", ())})
    head = ["model", "parameters", "seeds", "steps", "seconds", "right %", "spread", "streamed %"]
    cells = [[*head, *(f"to {distance:,}" for distance in farthest)]]
    for row in rows:
        n_seeds = str(len(row["seeds"]))
        if "diverged" in row:
            said = {"model": row["model"], "seeds": n_seeds, "right %": "diverged"}
            cells.append([said.get(title, "-") for title in cells[0]])
            continue
        counts = [f"{row['n_params']:,}", n_seeds, f"{row['steps']:,.0f}", f"{row['seconds']:,.0f}"]
        shares = [row[key] for key in ("accuracy", "spread", "streamed")]
        shares += [row["by_distance"].get(str(distance)) for distance in farthest]
        cells.append([row["model"], *counts, *map(_percent, shares)])
    return aligned(cells)


# --- the needle ----------------------------------------------------------------------------------


def _find(
    run: str | None,
    options: dict[str, Any],
    flags: dict[str, Any],
    json: str | None,
    plot: str | None,
) -> None:
    from tqdm import tqdm

    if run is None:
        raise UserError(f"the task {NEEDLE} needs a trained run; give RUN first")
    for key in flags:
        if key not in NEEDLE_KEYS:
            raise UserError(f"the task {NEEDLE} reads the run as it is; drop --{key}")
    use_threads(flags.get("threads", "auto"))
    distances = options.get("distances")
    with tqdm(unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        results = find_in_run(
            run,
            dataset=flags.get("dataset"),
            distances=None if distances is None else _distances(distances),
            n=options.get("needles", NEEDLES),
            device=flags.get("device", "auto"),
            progress=bar.update,
            log=lambda line: tqdm.write(line, file=sys.stderr),
        )
    rows = results.pop("rows")
    if json is not None:
        write_results(json, rows, task=NEEDLE, **results)
    about = ", ".join(f"{key} {results[key]}" for key in ("run", "dataset", "split", "tokenizer"))
    print(f"{about}, trained on {results['block_size']:,} tokens at once\n{needle_table(rows)}")
    if plot is not None:
        plot_needle(plot, rows, results["block_size"])


def _distances(text: str) -> list[int]:
    """The numbers of a list, ascending.

    Raises:
        UserError: one is no whole number of 1 or more, or comes twice.
    """
    parts = text.split(",")
    for part in parts:
        if not part.strip().isdecimal() or int(part) < 1:
            raise UserError(f"--distances: {part!r} is not 1 or more; give numbers such as 64,256")
    distances = sorted(map(int, parts))
    if len(set(distances)) < len(distances):
        raise UserError(f"--distances lists a number twice in {text}; give every one once")
    return distances


def needle_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `needle.evaluate` with aligned columns; a dash for a text of no window."""
    head = ["distance", "sentences", "tokens", *(f"{name} nats" for name in READINGS), "better"]
    head += [*(f"{name} %" for name in READINGS), "window %"]
    cells = [head]
    for row in rows:
        nats = {name: row[name]["nats"] for name in READINGS}
        cells.append(
            [
                f"{row['distance']:,}",
                f"{row['needles']:,}",
                f"{row['tokens']:,}",
                *(f"{value:.3f}" for value in nats.values()),
                f"{nats['first'] - nats['again']:+.3f}",
                *(_percent(row[name]["accuracy"]) for name in READINGS),
                _percent(row["window"]),
            ]
        )
    return aligned(cells)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
