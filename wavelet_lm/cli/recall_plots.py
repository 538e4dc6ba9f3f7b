"""What `recall` draws: accuracy by distance, and on the way there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.data.tasks.recall import RecallTask

PERCENT = (-2, 102)
CHANCE = {"color": "gray", "linewidth": 0.8, "linestyle": ":"}


def plot_tasks(
    path: str, runs: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], task: RecallTask
) -> None:
    """Accuracy of each model by distance, the mean of its seeds, and of every run by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_distance, by_step = figure.subplots(1, 2, sharey=True)
    for number, row in enumerate(rows):
        if "diverged" in row:
            continue
        style = {"color": f"C{number}", "marker": ".", "label": row["model"]}
        by_distance.plot(*_points(row["by_distance"]), **style)
        for run in runs:
            if run["model"] == row["model"]:
                curve = run["curve"]
                steps, shares = ([point[key] for point in curve] for key in ("step", "accuracy"))
                by_step.plot(steps, [100 * share for share in shares], color=f"C{number}")
    by_distance.set_xscale("log", base=2)
    by_distance.set(xlabel="distance of the answer, up to", ylabel="right answers (%)")
    by_step.set(xlabel="step, validation")
    for panel in (by_distance, by_step):
        panel.axhline(100 * task.chance, **CHANCE)
        panel.grid(alpha=0.3)
        panel.set_ylim(PERCENT)
    figure.suptitle(f"{task.meaning}: {task.describe()}", fontsize="medium")
    figure.legend(*by_distance.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _save(figure, path)


def plot_needle(path: str, rows: Sequence[dict[str, Any]], block_size: int) -> None:
    """Accuracy and nats of the sentence each time, by distance, with the training length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    distances = [row["distance"] for row in rows]
    for panel, key, scale, words in zip(
        panels, ("accuracy", "nats"), (100, 1), ("right tokens (%)", "nats per token"), strict=True
    ):
        for name, line in (("again", "-"), ("first", "--"), ("unseen", ":")):
            values = [scale * row[name][key] for row in rows]
            panel.plot(distances, values, linestyle=line, marker=".", label=name)
        panel.axvline(block_size, **CHANCE)
        panel.set_xscale("log", base=2)
        panel.set(xlabel="distance in tokens; dotted: the training length", ylabel=words)
        panel.grid(alpha=0.3)
    panels[0].set_ylim(PERCENT)
    panels[0].legend()
    _save(figure, path)


def _points(by_distance: dict[str, float]) -> tuple[list[int], list[float]]:
    return list(map(int, by_distance)), [100 * share for share in by_distance.values()]


def _save(figure: Any, path: str) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=120)
