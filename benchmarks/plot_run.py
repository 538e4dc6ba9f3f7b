"""Draw what runs wrote while they trained: losses, bits per byte, learning rate, speed.

    python benchmarks/plot_run.py logs/RUN --plot run.png
    python benchmarks/plot_run.py logs/ONE --beside logs/OTHER --plot both.png

Reads `metrics.jsonl` of each run folder, of one that is still training too. The training loss is
that of single batches, drawn pale, and their moving median over some steps.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import check_plot, check_targets

from wavelet_lm.atomic_files import atomic_path
from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.training.run_folder import RunFolder

MEDIAN_OF = 15  # lines of metrics.jsonl in a moving median


def main() -> None:
    parser = OneLineParser(run="run folder", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--beside", nargs="+", default=[], metavar="RUN", help="other run folders")
    parser.add_argument("--plot", default="run.png", metavar="FILE", help="[run.png]")
    args = parser.parse_args()
    check_plot(args.plot)
    check_targets([args.plot])
    plot(args.plot, {name: metrics(name) for name in [args.checkpoint, *args.beside]})
    print(args.plot)


def metrics(run: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl.

    Raises:
        UserError: there are none, or they are those of a classifier.
    """
    rows = RunFolder(Path(run)).metrics()
    if not any(row.get("event") == "train" for row in rows):
        raise UserError(f"{run}: no metrics.jsonl with a training step; give a run folder")
    if any("score" in row for row in rows):
        raise UserError(f"{run}: is the run of a classifier; give one of a language model")
    return rows


def moving_median(values: Sequence[float], width: int) -> list[float]:
    """The median of the `width` values around each, of fewer at the ends."""
    half = width // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def plot(path: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Losses beside learning rate and speed, one colour for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rate = right.twinx()
    losses = []
    for i, (name, rows) in enumerate(runs.items()):
        train = [row for row in rows if row["event"] == "train"]
        valid = [row for row in rows if row["event"] == "eval"]
        steps = [row["step"] for row in train]
        measured = [row["loss"] for row in train]
        losses += [row["val_loss"] for row in valid] + measured[len(measured) // 10 :]
        colour, label = f"C{i}", Path(name).name
        left.plot(steps, measured, color=colour, alpha=0.25, linewidth=0.8)
        medians = moving_median(measured, MEDIAN_OF)
        left.plot(steps, medians, color=colour, label=f"{label}, training")
        places, marks = [row["step"] for row in valid], [row["val_loss"] for row in valid]
        left.plot(places, marks, "o--", color=colour, label=f"{label}, validation")
        if valid and valid[-1].get("bits_per_byte") is not None:
            text = f"{valid[-1]['bits_per_byte']:.3f} bits/byte"
            left.annotate(
                text, (places[-1], marks[-1]), (0, 10), textcoords="offset points", ha="right"
            )
        speeds = moving_median([row["tokens_per_second"] for row in train], MEDIAN_OF)
        right.plot(steps, speeds, color=colour, label="tokens per second")
        rate.plot(steps, [row["lr"] for row in train], ":", color=colour, label="learning rate")
    left.set(xlabel="step", ylabel="nats per token", ylim=(0.9 * min(losses), 1.05 * max(losses)))
    left.legend()
    right.set(xlabel="step", ylabel="tokens per second (solid)")
    right.set_ylim(bottom=0)
    rate.set_ylabel("learning rate (dotted)")
    rate.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter("{x:,g}")
    right.yaxis.set_major_formatter("{x:,g}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.rsplit(".", 1)[-1].lower(), dpi=110)


if __name__ == "__main__":
    run_command(main)
