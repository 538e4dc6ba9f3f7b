"""Models trained to recall, one after the other, with several seeds, and what they then recall."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from wavelet_lm.config import Config
from wavelet_lm.data.tasks.recall import RecallTask
from wavelet_lm.devices import resolve_device
from wavelet_lm.evaluation.answers import by_farthest
from wavelet_lm.experiments.sweep import forget_the_last_run
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.threads import use_threads
from wavelet_lm.training.compilation import compiled
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.recall import Recall
from wavelet_lm.training.report import Diverged
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.tracking import refuse_watching

Row = dict[str, Any]


def compare(
    configs: Mapping[str, Config],
    task: RecallTask,
    seeds: Sequence[int],
    n_examples: int,
    *,
    shorter: Sequence[tuple[int, RecallTask]] = (),
    finished: Callable[[Row], None] = lambda run: None,
    log: Callable[[str], None] = print,
) -> list[Row]:
    """Train every model with every seed, the seeds one after the other, and ask it fresh questions.

    Args:
        configs: by the names of the models, all for one device; `max_steps` is set.
        shorter: what training begins with, as `Recall` has it.
        n_examples: to ask at the end of each run, of the weights that it ends with.
        finished: called after each run with its row.

    Returns:
        The rows of the runs, for `summary`: `model`, `seed`, `n_params`, `steps`, `seconds`, what
        `answers.judge` gives, `curve` and `config`; of one that diverged `model`, `seed` and
        `diverged`.

    Raises:
        UserError: what the `Trainer` raises otherwise.
        Interrupted: Ctrl-C or SIGTERM; the run that it stops is lost.
    """
    runs: list[Row] = []
    for name, config in configs.items():
        refuse_watching(name, config)
    for seed in seeds:
        for name, config in configs.items():
            log(f"\n{name}, seed {seed}: run {len(runs) + 1} of {len(seeds) * len(configs)}")
            config = config.replace(block_size=task.length, seed=seed)
            about = {"model": name, "seed": seed}
            forget_the_last_run()
            try:
                runs.append({**about, **_run(config, task, n_examples, shorter)})
            except Diverged as error:
                # What follows tells where weights are kept, and here none are.
                runs.append({**about, "diverged": str(error).split(";")[0]})
                log(runs[-1]["diverged"])
            finished(runs[-1])
    return runs


def _run(
    config: Config,
    task: RecallTask,
    n_examples: int,
    shorter: Sequence[tuple[int, RecallTask]],
) -> Row:
    """Train one model in a temporary run folder; its figures and its curve."""
    use_threads(config.threads)
    device = resolve_device(config.device)
    torch.manual_seed(config.seed)
    with device:
        model = build_model(config, task.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(config.replace(out_dir=folder), task.name)
        recall = Recall(config, model, task, device, shorter)
        recall.loss_function = compiled(model, config, device, run.log)
        trainer = Trainer(config, recall, run, config.max_steps)
        trainer.train()
        metrics = run.metrics()
    return {
        "n_params": n_params(model),
        "steps": trainer.progress.step,
        "seconds": round(trainer.progress.seconds, 3),
        **recall.asked("test", n_examples),
        "curve": [
            {key: row[key] for key in ("step", "val_loss", "accuracy")}
            for row in metrics
            if row["event"] == "eval"
        ],
        "config": config.to_dict(),
    }


def summary(runs: Sequence[Row]) -> list[Row]:
    """A row per model: means over its seeds, and `spread`, the highest accuracy less the lowest.

    One that diverged with any seed has no figures.
    """
    names = dict.fromkeys(run["model"] for run in runs)
    return [_row(name, [run for run in runs if run["model"] == name]) for name in names]


def _row(name: str, runs: Sequence[Row]) -> Row:
    row: Row = {"model": name, "seeds": [run["seed"] for run in runs]}
    for run in runs:
        if "diverged" in run:
            return {**row, "diverged": run["diverged"]}
    accuracies = [run["accuracy"] for run in runs]
    parts = [by_farthest(run) for run in runs]
    farthest = sorted(set().union(*parts))
    return {
        **row,
        "n_params": runs[0]["n_params"],
        **{
            key: statistics.fmean(run[key] for run in runs)
            for key in ("steps", "seconds", "accuracy", "streamed")
        },
        "spread": max(accuracies) - min(accuracies),
        "largest_difference": max(run["largest_difference"] for run in runs),
        "by_distance": {
            str(distance): statistics.fmean(part[distance] for part in parts if distance in part)
            for distance in farthest
        },
    }
