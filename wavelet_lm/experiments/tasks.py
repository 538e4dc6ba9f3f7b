"""Several models trained and judged on one task: what the commands that do it share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from wavelet_lm.config import Config
from wavelet_lm.data.tasks.examples import Examples, Splits
from wavelet_lm.devices import resolve_device
from wavelet_lm.experiments.results import write_results
from wavelet_lm.models.classifier.model import SequenceClassifier
from wavelet_lm.models.registry import n_params
from wavelet_lm.tables import aligned
from wavelet_lm.threads import use_threads
from wavelet_lm.training.classification import Score, accuracy, total_steps, train_with_bar

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
}
JUDGED = ("valid", "test")
COUNTS = ("n_params", "steps", "best_step", "seconds")


def compare(
    configs: Mapping[str, Config],
    task: Splits,
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
        build: a model with new weights.
        judge: the figures of a split.
        score: as `train` takes it.
        file: gets the results after each model, so that an interrupted comparison leaves those
            that it has.
        about: what else stands in the file.

    Returns:
        A row for each model.
    """
    rows: list[dict[str, Any]] = []
    for name, config in configs.items():
        config = config.replace(block_size=task.longest)
        use_threads(config.threads)
        device = resolve_device(config.device)
        torch.manual_seed(config.seed)
        with device:
            model = build(config)
        training = train_with_bar(name, model, task.train, task.valid, config, score)
        row = {
            "model": name,
            "n_params": n_params(model),
            "steps": total_steps(config, len(task.train)),
            "best_step": training.best_step,
            "seconds": round(training.seconds, 3),
            **{part: judge(model, getattr(task, part), config) for part in JUDGED},
            "curve": training.curve,
            "config": config.to_dict(),
        }
        rows.append(row)
        if file is not None:
            write_results(file, rows, **about, device=str(device))
    return rows


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
