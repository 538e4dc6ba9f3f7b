"""`loss.png`: the losses of a run, drawn at its end where matplotlib is installed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.training.run_folder import RunFolder

PICTURE = "loss.png"
MEDIAN_OF = 15  # lines of metrics.jsonl in a moving median
MOST_POINTS = 2000  # of a curve: what a picture of this size can show


def draw_losses(run: RunFolder) -> str:
    """Draw the training loss, its moving median, and the validation over the steps.

    A classifier's validation, whose score is no loss, is left out.

    Returns:
        What became of it, as one line for the log.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return (
            f'no {PICTURE}: matplotlib is not installed; pip install "wavelet-lm[track]" brings it'
        )
    rows = run.metrics()
    train = [(row["step"], row["loss"]) for row in rows if row["event"] == "train"]
    valid = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    train = train[:: -(-len(train) // MOST_POINTS) or 1]
    figure = Figure(figsize=(7, 4), dpi=100)
    axes = figure.add_axes((0.1, 0.13, 0.87, 0.78))
    steps, losses = [step for step, _ in train], [loss for _, loss in train]
    axes.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8)
    axes.plot(steps, moving_median(losses, MEDIAN_OF), color="C0", label="training")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o--", color="C1", markersize=4, label="validation")
    settled = losses[len(losses) // 10 :] + [loss for _, loss in valid]
    if settled:
        axes.set_ylim(0.95 * min(settled), 1.05 * max(settled))
    axes.set(xlabel="step", ylabel="nats", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(run.path / PICTURE) as temporary:
        figure.savefig(temporary, format="png")
    return f"drawn: {run.path / PICTURE}"


def moving_median(values: Sequence[float], width: int) -> list[float]:
    """The median of the `width` values around each, of fewer at the ends."""
    half = width // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
