"""Several models trained and judged on one task: what the commands that do it share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from signal import SIGINT
from typing import Any

import torch

from wavelet_lm.config import Config
from wavelet_lm.data.tasks.examples import Examples, Splits
from wavelet_lm.devices import resolve_device
from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.experiments.comparison_folder import ComparisonFolder, ModelRun
from wavelet_lm.experiments.results import write_results
from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.models.classifier.model import SequenceClassifier
from wavelet_lm.models.registry import n_params
from wavelet_lm.tables import aligned
from wavelet_lm.threads import use_threads
from wavelet_lm.training.changes import refuse_other_config
from wavelet_lm.training.classification import Classification, Score, accuracy, total_steps
from wavelet_lm.training.loop import Trainer
from wavelet_lm.training.running import running
from wavelet_lm.training.saved_state import open_saved
from wavelet_lm.training.tracking import check_tracker, tracked

Judge = Callable[[SequenceClassifier, Examples, Config], dict[str, Any]]

# The WaveletGPT paper's models, and the training of the arena.
DEFAULTS: dict[str, Any] = {
    "layers": 6,
    "C": 32,
    "levels": 8,
    "per_scale_mixer_widths": None,
    "mlp_expansion": 4,
    "pkm_enabled": False,
    "fwpkm_enabled": False,
    **dict.fromkeys(
        ("dropout_embedding", "dropout_mixer", "dropout_projection", "dropout_mlp"), 0.1
    ),
    "dropout_lm_head": 0.0,
    "optimizer": "AdamW",
    "optimizer_eps": 1e-8,
    "adam_betas": (0.9, 0.98),
    "lr": 1e-3,
    "min_lr": 1e-5,
    "weight_decay": 0.01,
    "warmup_fraction": 0.1,
    "micro_batch_size": 32,
    "skip_warmup_saves": False,
}
JUDGED = ("valid", "test")
COUNTS = ("n_params", "steps", "best_step", "seconds")


def compare(
    configs: Mapping[str, Config],
    task: Splits,
    folder: ComparisonFolder,
    *,
    build: Callable[[Config], SequenceClassifier],
    judge: Judge,
    score: Score = accuracy,
    file: str | None = None,
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Train the models one after the other and judge the best weights of each.

    Args:
        configs: by name, all for one device.
        folder: of their runs; those that it has are gone on with, or taken as they ended.
        build: a model with new weights.
        judge: the figures of a split.
        score: of a validation, see `Classification`.
        file: gets the results after each model.
        about: what else stands in the file.

    Returns:
        A row for each model.

    Raises:
        UserError: what the `Trainer` raises, and a run in the folder that is none of these.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP, after saving.
    """
    rows: list[dict[str, Any]] = []
    for name, config in configs.items():
        # Every step has its line of the metrics, of which the curve is made.
        config = config.replace(block_size=task.longest, log_interval=1)
        check_tracker(config)
        use_threads(config.threads)
        device = resolve_device(config.device)
        try:
            run = folder.run(name)
            if run.last.is_file():
                refuse_other_config(run, config)
            if not run.is_finished():
                train_one(name, config, task, folder, device, build, judge, score)
        except UserError as error:
            folder.remove_if_empty()
            raise UserError(f"{name}: {error}") from error
        except (KeyboardInterrupt, Interrupted) as stop:
            words = str(stop) or "stopped"
            if folder.go_on not in words:
                words += f"; go on with: {folder.go_on}"
            raise Interrupted(getattr(stop, "signum", SIGINT), f"{name}: {words}") from None
        rows.append(row_of(run, config))
        if file is not None:
            write_results(file, rows, **about, device=str(device))
    return rows


def train_one(
    name: str,
    config: Config,
    task: Splits,
    folder: ComparisonFolder,
    device: torch.device,
    build: Callable[[Config], SequenceClassifier],
    judge: Judge,
    score: Score,
) -> None:
    """Train one model, from where its run stands if it has begun, and judge its best weights."""
    torch.manual_seed(config.seed)
    with device:
        model = build(config)
    run = folder.run(name)
    goes_on = run.last.is_file()
    if not goes_on:
        run = folder.begin(name, config)
    learning = Classification(config, model, task, device, score)
    trainer = Trainer(config, learning, run, total_steps(config, len(task.train)))
    done = trainer.progress
    if goes_on:
        run.remove_temporary_files()
        trainer.restore(open_saved(run.last))
        run.drop_metrics_after(done.step, done.evaluated_step)
        run.log(f"resumed at step {done.step} of {done.total_steps}: {run.command}")
    with running(run), tracked(config, run, done.step):
        trainer.train()
        Checkpoint(run.best).load_into(model)
        figures = {part: judge(model, getattr(task, part), config) for part in JUDGED}
        counts = {"n_params": n_params(model), "best_step": done.best_step}
        run.write_metrics(event="test", step=done.step, **counts, **figures)
        run.write_metrics(event="end", step=done.step, seconds=round(done.seconds, 3))


def row_of(run: ModelRun, config: Config) -> dict[str, Any]:
    """What the results say of a finished run."""
    metrics = run.metrics()
    last = {row["event"]: row for row in metrics}
    return {
        "model": run.title,
        "n_params": last["test"]["n_params"],
        "steps": last["end"]["step"],
        "best_step": last["test"]["best_step"],
        "seconds": last["end"]["seconds"],
        **{part: last["test"][part] for part in JUDGED},
        "curve": curve_of(metrics),
        "config": config.to_dict(),
    }


def curve_of(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """A row per validation: step, train_loss (mean nats since the row before), valid, seconds."""
    trained = {row["step"]: row for row in metrics if row["event"] == "train"}
    curve: list[dict[str, float]] = []
    for row in metrics:
        if row["event"] != "eval":
            continue
        step, before = row["step"], curve[-1]["step"] if curve else 0
        losses = [trained[i]["loss"] for i in range(before + 1, step + 1)]
        curve.append(
            {
                "step": step,
                "train_loss": torch.tensor(losses).mean().item(),
                "valid": row["score"],
                "seconds": trained[step]["seconds"],
            }
        )
    return curve


def table(rows: Sequence[Mapping[str, Any]], shares: Mapping[str, str]) -> str:
    """The results with aligned columns; what a row has no count of stays empty.

    Args:
        shares: title → key of the figures that are shown in percent, for each split.
    """
    titles = [f"{part} {title}" for part in JUDGED for title in shares]
    cells = [["model", "parameters", "steps", "best step", "seconds", *titles]]
    for row in rows:
        counts = (f"{row[key]:,.0f}" if key in row else "" for key in COUNTS)
        percents = (f"{100 * row[part][key]:.2f}" for part in JUDGED for key in shares.values())
        cells.append([row["model"], *counts, *percents])
    return aligned(cells)
