"""What watches a run from outside: TensorBoard, Weights & Biases or trackio, each by its library.

A tracker hears every line of metrics.jsonl as it is written, and changes nothing of the run: where
it fails, the run says so once and goes on without.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError, missing_extra
from wavelet_lm.training.run_folder import RunFolder, SilentRunFolder

PROJECT = "wavelet-lm"  # unless the library's own variable names another
Row = Mapping[str, Any]


class Tracker:
    """One of them; `log` and `text` get the step that they belong to."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name, as `scalars` gives them."""
        raise NotImplementedError

    def text(self, step: int, text: str) -> None:
        """A sample."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left."""
        raise NotImplementedError

    def heard(self, row: Row) -> None:
        """A line of metrics.jsonl."""
        if row["event"] == "sample":
            self.text(row["step"], row["prompt"] + row["text"])
        elif values := scalars(row):
            self.log(row["step"], values)


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, by the names that they have in a tracker.

    Examples:
        >>> from wavelet_lm.training.tracking import scalars
        >>> scalars({"event": "eval", "step": 20, "val_loss": 2.5, "bits_per_byte": None})
        {'valid/loss': 2.5}
    """
    event = row["event"]
    if event == "scales":
        return _of_scales(row["blocks"])
    if event == "sample":
        return {}
    group = {"eval": "valid"}.get(event, event)
    values = {key: value for key, value in row.items() if key not in ("event", "step", "val_loss")}
    if "val_loss" in row:
        values["loss"] = row["val_loss"]
    return dict(_numbers(values, group))


def _of_scales(blocks: list[dict[str, Any]]) -> dict[str, float]:
    values = {}
    for block in blocks:
        scales = zip(block["scales"], block["weights"], block["lags"], strict=True)
        for name, weight, lags in scales:
            values[f"scale weight/{block['name']}/{name}"] = weight
            for i, lag in enumerate(lags):
                which = f" {i + 1}" if len(lags) > 1 else ""
                values[f"lag/{block['name']}/{name}{which}"] = lag
    return values


def _numbers(values: Row, prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}/{key}", value


class TensorBoard(Tracker):
    """Writes the event files of TensorBoard to `tensorboard/` in the run folder."""

    def __init__(self, config: Config, run: RunFolder, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What a run wrote after the checkpoint that it goes on from is written again.
        purge = {"purge_step": step + 1} if step else {}
        self._writer = SummaryWriter(str(run.path / "tensorboard"), flush_secs=30, **purge)
        self._writer.add_text("config", _as_markdown(config.to_json()), step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, text: str) -> None:
        self._writer.add_text("sample", _as_markdown(text), step)

    def close(self) -> None:
        self._writer.close()


def _as_markdown(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


class WandB(Tracker):
    """A run of Weights & Biases, on this machine alone unless WANDB_MODE says otherwise."""

    def __init__(self, config: Config, run: RunFolder, step: int):
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.name,
                id=_identity(run),
                dir=str(run.path),
                mode=mode,
                config=config.to_dict(),
                resume="allow" if step and mode == "online" else None,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            line = " ".join(str(error).split())
            raise UserError(f"track wandb: {line}; WANDB_MODE=offline needs no account") from None
        if mode == "offline":
            folder = run.path / "wandb" / Path(self._run.settings.sync_dir).name
            run.log(f"wandb keeps the run here; to send it: wandb sync {folder}")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def text(self, step: int, text: str) -> None:
        import wandb

        self._run.log({"sample": wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(Tracker):
    """A run of trackio, in its folder on this machine (TRACKIO_DIR); `trackio show` opens it."""

    def __init__(self, config: Config, run: RunFolder, step: int):
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.name,
            config=config.to_dict(),
            resume="allow" if step else "never",
            embed=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def text(self, step: int, text: str) -> None:
        self._run.log({"sample": text}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def check_tracker(config: Config) -> None:
    """Raise `UserError` before a run whose tracker is not installed."""
    if config.track != "none" and find_spec(config.track) is None:
        raise missing_extra(f"track {config.track}", config.track, "track")


def refuse_watching(name: str, config: Config) -> None:
    """Raise `UserError` where a run that is not kept, of a model of this name, is to be watched."""
    if config.track != "none" or config.sample_interval:
        raise UserError(
            f"{name}: track and sample_interval are for runs that are kept, and a comparison keeps"
            " none; leave them out"
        )


@contextmanager
def tracked(config: Config, run: RunFolder, step: int) -> Iterator[None]:
    """Inside, the tracker of a config hears what a run writes.

    Args:
        step: that a run goes on from, 0 for a new one.
    """
    if config.track == "none" or isinstance(run, SilentRunFolder):
        yield
        return
    tracker = TRACKERS[config.track](config, run, step)

    def hear(row: Row) -> None:
        with _not_fatal(config.track, run, hear):
            tracker.heard(row)

    run.listeners.append(hear)
    try:
        yield
    finally:
        if hear in run.listeners:
            with _not_fatal(config.track, run, hear):
                tracker.close()
        with suppress(ValueError):
            run.listeners.remove(hear)


@contextmanager
def _not_fatal(name: str, run: RunFolder, hear: Any) -> Iterator[None]:
    """What a tracker cannot do ends the tracking, with one line, and not the run."""
    try:
        yield
    except Exception as error:
        run.listeners.remove(hear)
        words = " ".join(str(error).split())
        run.log(f"{name} fails, and the run goes on without: {type(error).__name__}: {words}")


def _identity(run: RunFolder) -> str:
    """The same for a run that is resumed, and another for every other run."""
    file = run.path / "environment.json"
    about = file.read_bytes() if file.is_file() else b""
    return hashlib.sha256(about + json.dumps(run.name).encode()).hexdigest()[:16]
