"""Train models on the same batches and compare what each needs to reach the loss of the first.

    python -m wavelet_lm.evaluation.compare --models gpt,wavelet_gpt:haar,wavelet_gpt:db4@0.25 \\
        --dataset data/tinyshakespeare/input.txt --budget steps:2000 --json FILE --plot FILE.png

A model is MODEL[:MODULE][@FRACTION][+KEY=VALUE...]: the module and the share of averaged channels
of a wavelet_gpt, and any other key of the network, as in wavelet_lm+layers=2+mlp_expansion=1. All
else is the same for all: the config, the order of the batches for a seed, the windows of the
validation, the learning rates that are tried. Every run is as long as the budget says; without one,
as long as the config. Validation follows eval_interval and eval_batches.

The best learning rate has the lowest validation loss at the end. The table has of it that loss,
its difference from the first model's, and where it reaches that one's, between validations on a
straight line; before it the mean training loss of the steps between the last two validations. FLOPs
are those of matrix products, forward and backward. Times are those of the training steps alone;
they mean something on a machine that does nothing else.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from signal import SIGINT
from typing import Any

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.cli.flags import OneLineParser, add_config_flags, listed, parse_flags
from wavelet_lm.config import FIELDS, Config, check_values, read_config
from wavelet_lm.data.dataset import TokenizedText, prepare_data
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.experiments.comparison import Budget, check, compare, summary, tokens_per_step
from wavelet_lm.experiments.model_names import SYNTAX, model_configs, split_names
from wavelet_lm.experiments.results import IMAGES, check_plot, check_targets, write_results
from wavelet_lm.streams import output_is_optional
from wavelet_lm.tables import aligned
from wavelet_lm.training.processes import one_process_only

CONFIG = "configs/wavelet_gpt_char.json"
# Keys of the config, and the options that decide them here.
DECIDED = {
    "models": ("model",),
    "budget": ("max_steps", "epochs"),
    "lrs": ("lr",),
    "seeds": ("seed",),
}
HEAD = ("model", "parameters", "runs", "lr", "steps", "seconds", "FLOPs", "tokens/s", "time/step")
HEAD += ("train nats", "valid nats", "difference")
HEAD += ("parity step", "parity epoch", "parity seconds", "parity FLOPs")


def main() -> None:
    one_process_only("compare")
    parser = OneLineParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --models MODEL,MODEL,… [--config FILE]"
        " [--budget steps:N|seconds:N|flops:N] [--lrs LIST] [--seeds LIST] [--json FILE]"
        " [--plot FILE] [--key value …]",
    )
    add_flags(parser)
    flags = parse_flags(parser)
    own = {key: flags.pop(key) for key in (*DECIDED, "config", "json", "plot")}
    configs, budget, lrs, seeds = what_to_train(own, flags)
    check_targets((own["json"], own["plot"]))
    if own["plot"]:
        check_plot(own["plot"])
    data = prepare_data(next(iter(configs.values())))
    about = {"config": own["config"], **_settings(configs, data, budget, lrs, seeds)}
    runs: list[dict[str, Any]] = []
    if own["json"]:
        output_is_optional()

    def finished(run: dict[str, Any]) -> None:
        runs.append(run)
        if own["json"]:
            write_results(own["json"], summary(runs), **about, runs=runs)

    try:
        compare(configs, data, budget, lrs, seeds, finished=finished)
    except (KeyboardInterrupt, Interrupted) as stop:
        _conclude(runs, own["plot"])
        n = len(configs) * len(lrs) * len(seeds)
        kept = f" and kept in {own['json']}" if own["json"] and runs else ""
        message = f"stopped; {len(runs)} of {n} runs are finished{kept}"
        raise Interrupted(getattr(stop, "signum", SIGINT), message) from None
    _conclude(runs, own["plot"])


# --- what is typed -------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's own options, then those of the config."""
    add = parser.add_argument
    add("--models", metavar="LIST", help=f"{SYNTAX}, …; the others are held against the first")
    add("--config", default=CONFIG, metavar="FILE", help="what they share [%(default)s]")
    add("--budget", metavar="BUDGET", help="of every run: steps:N, seconds:N or flops:N")
    add("--lrs", metavar="LIST", help="learning rates to try with every model [the config's lr]")
    add("--seeds", metavar="LIST", help="seeds to train every model with [the config's seed]")
    add("--json", metavar="FILE", help="write the results there, after every run")
    add("--plot", metavar="FILE", help=f"draw them there ({', '.join(IMAGES)})")
    add_config_flags(parser)


def what_to_train(
    own: dict[str, Any], flags: dict[str, Any]
) -> tuple[dict[str, Config], Budget | None, list[float], list[int]]:
    """The config of each model by name, the budget, the learning rates and the seeds.

    Args:
        own: the options of `add_flags`, by name.
        flags: the keys of the config.

    Raises:
        UserError: one of them is not allowed, or a model cannot be built or trained here.
    """
    if own["models"] is None:
        raise UserError(f"which models? give --models {SYNTAX}, separated by commas")
    for option, keys in DECIDED.items():
        both = [key for key in keys if key in flags and own[option] is not None]
        if both:
            raise UserError(f"--{option} decides {both[0]}; drop --{both[0]}")
    budget = None if own["budget"] is None else Budget.parse(own["budget"])
    given = read_config(own["config"])
    check_values(given, own["config"])
    values = {**given, **flags}
    if values.get("init_from"):
        raise UserError("init_from is set, and compared models start from random weights; drop it")
    lrs, seeds = (
        listed(key, own[f"{key}s"], values.get(key, FIELDS[key].default)) for key in ("lr", "seed")
    )
    configs = model_configs(split_names(own["models"]), values)
    for name, config in configs.items():
        for lr in lrs:
            Config.from_dict({**config.to_dict(), "lr": lr}, name)
    check(configs, vocab_size=1)  # what cannot be built should say so before any data is fetched
    return configs, budget, lrs, seeds


# --- results -------------------------------------------------------------------------------------


def _settings(
    configs: dict[str, Config],
    data: TokenizedText,
    budget: Budget | None,
    lrs: Sequence[float],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """What all runs have in common."""
    config = next(iter(configs.values()))
    return {
        "dataset": config.dataset,
        "tokenizer": data.tokenizer.name,
        "vocab_size": data.tokenizer.vocab_size,
        "train_tokens": len(data.train.tokens),
        "tokens_per_step": tokens_per_step(config),
        "budget": None if budget is None else asdict(budget),
        "lrs": list(lrs),
        "seeds": list(seeds),
    }


def _conclude(runs: Sequence[dict[str, Any]], plot_file: str | None) -> None:
    if not runs:
        return
    print(f"\n{table(summary(runs))}")
    if plot_file:
        plot(plot_file, runs)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary with aligned columns; a dash where there is no figure."""
    return aligned([HEAD, *(_cells(row, rows[0]) for row in rows)])


def _cells(row: dict[str, Any], first: dict[str, Any]) -> list[str]:
    if "diverged" in row:
        said = {"model": row["model"], "runs": str(row["n_runs"]), "valid nats": "diverged"}
        return [said.get(column, "-") for column in HEAD]
    ratio, parity = row["relative_step_time"], row["parity"]
    difference = "-"
    if "valid_loss" in first:
        difference = f"{row['valid_loss'] - first['valid_loss']:+.4f}"
    where = ["-"] * 4
    if parity is not None:
        step, epoch, seconds, flops = parity.values()
        where = [f"{step:,.0f}", f"{epoch:.2f}", f"{seconds:,.1f}", f"{flops:.3g}"]
    return [
        row["model"],
        f"{row['n_params']:,}",
        str(row["n_runs"]),
        f"{row['lr']:g}",
        f"{row['steps']:,.0f}",
        f"{row['seconds']:,.1f}",
        f"{row['flops']:.3g}",
        f"{row['tokens_per_second']:,.0f}",
        "-" if ratio is None else f"{ratio:.3f}",
        f"{row['train_loss']:.4f}",
        f"{row['valid_loss']:.4f}",
        difference,
        *where,
    ]


def plot(path: str, runs: Sequence[dict[str, Any]]) -> None:
    """Validation losses of the chosen learning rates against steps, seconds and FLOPs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    axes = {"step": "step", "seconds": "seconds of training", "flops": "FLOPs of matrix products"}
    for number, row in enumerate(summary(runs)):
        if "diverged" in row:
            continue
        for run in runs:
            if (run["model"], run["lr"]) != (row["model"], row["lr"]):
                continue
            points = run["curve"][1:]  # before the first step all models are equally bad
            losses = [point["valid_loss"] for point in points]
            is_first_seed = run["seed"] == row["seeds"][0]
            style = {"color": f"C{number}", "linestyle": "-" if is_first_seed else "--"}
            label = f"{row['model']}, lr {row['lr']:g}" if is_first_seed else None
            for panel, axis in zip(panels, axes, strict=True):
                panel.plot([point[axis] for point in points], losses, label=label, **style)
            if number == 0:
                for panel in panels:
                    panel.axhline(losses[-1], color="gray", linewidth=0.8, linestyle=":")
    for panel, words in zip(panels, axes.values(), strict=True):
        panel.set(xlabel=words)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="validation loss (nats per token)")
    panels[2].xaxis.set_major_formatter(EngFormatter())
    panels[2].locator_params(axis="x", nbins=6)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=120)
