"""Run folders, read: what a table of them says, and the curves that a page draws."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from wavelet_lm.config import read_json_object
from wavelet_lm.errors import UserError
from wavelet_lm.hub_paths import is_in_hub
from wavelet_lm.models.checkpoint import EXTRA
from wavelet_lm.training.checkpoint_folder import saved_steps
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.running import state_of

DEPTH = 2  # folders below one that is searched: logs/RUN, and logs/COMPARISON/MODEL
MOST_POINTS = 1500  # of a curve


@dataclass(frozen=True)
class Figures:
    """What is known of a run; None where it is not known (yet).

    unit: what `amount` and the speed count, tokens or sequences; best_bits_per_byte, best_loss (in
    nats): of the validations, best_score: of a classifier's; test_bits_per_byte: of the evaluation
    at the end, sliding; seconds: of training alone; date: ISO, of its beginning.
    """

    name: str
    path: str
    state: str
    model: str
    dataset: str
    n_params: int | None
    step: int
    total_steps: int | None
    unit: str
    amount: int
    best_bits_per_byte: float | None
    best_loss: float | None
    best_score: float | None
    test_bits_per_byte: float | None
    seconds: float
    per_second: float | None
    memory_bytes: int | None
    date: str


def find_runs(places: Iterable[str | Path]) -> list[RunFolder]:
    """The run folders among these, and those in the others of them, each once.

    Raises:
        UserError: a place is no folder of this machine, or no run is there.
    """
    found: dict[Path, RunFolder] = {}
    for place in places:
        if is_in_hub(place):
            raise UserError(f"{place}: is in the hub; give folders of this machine")
        folder = Path(place).expanduser()
        if not folder.is_dir():
            raise UserError(f"{place}: there is no such folder; give run folders, or one of them")
        runs = list(_runs_in(folder, DEPTH))
        if not runs:
            raise UserError(f"{place}: no run folder (with a config.json), and none in it")
        found |= {run.path.resolve(): run for run in runs}
    return list(found.values())


def _runs_in(folder: Path, depth: int) -> Iterable[RunFolder]:
    if (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file():
        yield RunFolder(folder)
    elif depth:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from _runs_in(inner, depth - 1)


def figures_of(run: RunFolder) -> Figures:
    """Read a run's folder, whether it has ended or not.

    Raises:
        UserError: its config.json is damaged.
    """
    rows, config = run.metrics(), read_json_object(run.config_file)
    train, valid = (_rows(rows, event) for event in ("train", "eval"))
    tests, ends = (_rows(rows, event) for event in ("test", "end"))
    unit = unit_of(rows)
    header = _header(run)
    saved = json.loads(header.get("__metadata__", {}).get("metadata", "{}"))
    # A run that was stopped is saved at its last step, of which no line may have told.
    reached = [saved.get("step", 0), *(step for step, _, _ in saved_steps(run.checkpoints))]
    step = max([*reached, *(row["step"] for row in (*train, *valid))])
    lengths = (config.get("max_steps"), saved.get("total_steps"))
    total = next((n for n in lengths if n is not None), ends[-1]["step"] if ends else None)
    sizes = [
        math.prod(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and not name.startswith(EXTRA)
    ]
    sliding = tests[-1].get("sliding") if tests else None
    last = train[-1] if train else {}
    return Figures(
        name=run.name,
        path=str(run.path),
        state=state_of(run),
        model=config.get("model", "?"),
        dataset=str(config.get("dataset", "?")),
        n_params=tests[-1].get("n_params") if tests else (sum(sizes) or None),
        step=step,
        total_steps=total,
        unit=unit,
        amount=step * per_step(config, unit),
        best_bits_per_byte=_least(row.get("bits_per_byte") for row in valid),
        best_loss=_least(row.get("val_loss") for row in valid),
        best_score=max((row["score"] for row in valid if "score" in row), default=None),
        test_bits_per_byte=sliding.get("bits_per_byte") if sliding else None,
        seconds=max([saved.get("seconds", 0.0), *(row["seconds"] for row in (*train, *ends))]),
        per_second=last.get(f"{unit}_per_second"),
        memory_bytes=max((row.get("memory_bytes", 0) for row in train), default=0) or None,
        date=_date(run),
    )


def unit_of(rows: Sequence[dict[str, Any]]) -> str:
    """What the speed of a run counts: tokens, or a classifier's sequences."""
    return "sequences" if any("sequences_per_second" in row for row in rows) else "tokens"


def per_step(config: dict[str, Any], unit: str) -> int:
    """How many of them a step reads."""
    windows = config.get("micro_batch_size", 0) * config.get("grad_accum", 1)
    return windows * (config.get("block_size", 0) if unit == "tokens" else 1)


def environment_of(run: RunFolder) -> dict[str, Any]:
    """Its environment.json; empty where there is none."""
    file = run.path / "environment.json"
    return read_json_object(file) if file.is_file() else {}


def curves_of(run: RunFolder) -> dict[str, Any]:
    """What a page draws, as columns: `train`, `valid`, and `scales`; null where nothing is known.

    A column of more than `MOST_POINTS` lines is drawn as the means of as many neighbours.
    """
    rows = run.metrics()
    unit = unit_of(rows)
    train, valid = _rows(rows, "train"), _rows(rows, "eval")
    keys = {"loss": "loss", "lr": "lr", "grad_norm": "grad_norm", "memory": "memory_bytes"}
    keys |= {"speed": f"{unit}_per_second"}
    clock = {row["step"]: row["seconds"] for row in train}
    times = sorted(clock.items())
    together = -(-len(train) // MOST_POINTS) or 1
    groups = [train[i : i + together] for i in range(0, len(train), together)]
    drawn = {name: [_mean(g, key) for g in groups] for name, key in keys.items()}
    return {
        "unit": unit,
        "per_step": per_step(read_json_object(run.config_file), unit),
        "together": together,
        "train": {
            "step": [group[-1]["step"] for group in groups],
            "seconds": [group[-1]["seconds"] for group in groups],
            **drawn,
        },
        "valid": {
            "step": [row["step"] for row in valid],
            "seconds": [_at(times, row["step"]) for row in valid],
            "loss": [row.get("val_loss") for row in valid],
            "bits_per_byte": [row.get("bits_per_byte") for row in valid],
            "score": [row.get("score") for row in valid],
        },
        "scales": _scales(_rows(rows, "scales"), times),
    }


def _scales(rows: list[dict[str, Any]], times: list[tuple[int, float]]) -> dict[str, Any]:
    """The weights and the first lags of every scale of every block, as columns by their names."""
    columns: dict[str, Any] = {
        "step": [row["step"] for row in rows],
        "seconds": [_at(times, row["step"]) for row in rows],
        "weights": {},
        "lags": {},
    }
    for row in rows:
        for block in row["blocks"]:
            for name, weight, lags in zip(
                block["scales"], block["weights"], block["lags"], strict=True
            ):
                label = f"{block['name']} {name}"
                columns["weights"].setdefault(label, []).append(weight)
                if lags:
                    columns["lags"].setdefault(label, []).append(sum(lags) / len(lags))
    return columns


def samples_of(run: RunFolder) -> list[dict[str, Any]]:
    """The texts that it wrote while it was trained, and at its end."""
    return _rows(run.metrics(), "sample")


def as_json(found: Sequence[Figures]) -> str:
    """All that is known of runs."""
    return json.dumps([asdict(figures) for figures in found], indent=1) + "\n"


def _rows(rows: Iterable[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("event") == event]


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    return float(f"{sum(values) / len(values):.6g}") if values else None


def _at(times: list[tuple[int, float]], step: int) -> float:
    """Seconds of training at a step, in proportion between the lines that tell."""
    before = (0, 0.0)
    for there in times:
        if there[0] >= step:
            share = (step - before[0]) / max(1, there[0] - before[0])
            return round(before[1] + share * (there[1] - before[1]), 3)
        before = there
    return before[1]


def _header(run: RunFolder) -> dict[str, Any]:
    """Names and shapes of the last or the best checkpoint; empty where there is none."""
    for file in (run.last, run.best):
        try:
            with file.open("rb") as opened:
                return json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        except (OSError, ValueError, OverflowError, MemoryError):
            continue
    return {}


def _date(run: RunFolder) -> str:
    date = environment_of(run).get("date")
    if date is None:
        written = run.config_file.stat().st_mtime
        date = datetime.fromtimestamp(written).astimezone().isoformat(timespec="seconds")
    return date
