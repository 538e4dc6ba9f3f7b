"""A table of runs: what they are, how far they came, how good they are, whether they go on.

    wavelet-lm runs
    wavelet-lm runs logs --sort bits --json runs.json

A run has ended, is running, has stopped in good order (Ctrl-C; `train.py --resume RUN` goes on with
it), or has died.
"""

import argparse
import sys

from wavelet_lm.atomic_files import check_writable, write_text
from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.errors import UserError
from wavelet_lm.report.runs import Figures, as_json, figures_of, find_runs
from wavelet_lm.report.words import amount, duration, figure
from wavelet_lm.tables import aligned

# By what to sort, and whether the largest come first; what is not known comes last.
ORDERS = {
    "date": ("date", True),
    "name": ("name", False),
    "state": ("state", False),
    "model": ("model", False),
    "parameters": ("n_params", True),
    "steps": ("step", True),
    "tokens": ("amount", True),
    "bits": ("best_bits_per_byte", False),
    "time": ("seconds", True),
}


def main() -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="*", default=["logs"], metavar="DIR", help="where they are [logs]"
    )
    parser.add_argument("--sort", choices=ORDERS, default="date", help="[date, newest first]")
    parser.add_argument("--json", metavar="FILE", help="also write all that is known there")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json)
    known = []
    for run in find_runs(args.folders):
        try:
            known.append(figures_of(run))
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    found = in_order(known, args.sort)
    if args.json:
        write_text(args.json, as_json(found))
    print(table(found))


def in_order(found: list[Figures], key: str) -> list[Figures]:
    """Runs sorted by one of `ORDERS`."""
    name, descending = ORDERS[key]
    known = [figures for figures in found if getattr(figures, name) is not None]
    known.sort(key=lambda figures: getattr(figures, name), reverse=descending)
    return known + [figures for figures in found if getattr(figures, name) is None]


def table(found: list[Figures]) -> str:
    """Aligned columns, a line for each run."""
    rows = [["run", "state", "model", "parameters", "steps", "tokens", "bits/byte", "time"]]
    for run in found:
        steps = f"{run.step:,}" + (f"/{run.total_steps:,}" if run.total_steps else "")
        rows.append(
            [
                run.path,
                run.state,
                run.model,
                amount(run.n_params),
                steps,
                amount(run.amount) if run.unit == "tokens" else "-",
                figure(run.best_bits_per_byte),
                duration(run.seconds),
            ]
        )
    return aligned(rows)
