"""The folder of one run: config, environment, logs, metrics, checkpoints."""

import errno
import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from wavelet_lm.atomic_files import append_line, as_user_error, write_text
from wavelet_lm.config import CHANGES, Config, read_json_object
from wavelet_lm.errors import UserError
from wavelet_lm.hub_paths import is_in_hub
from wavelet_lm.training.processes import command_words, launcher, n_processes
from wavelet_lm.training.provenance import command_line, environment


class RunFolder:
    """Paths and writers of a run folder; `log` speaks to the terminal and to `log.txt`.

    Attributes:
        command: that makes the run.
        go_on: the command that goes on with it.
        title: what stands before its progress bar.
        listeners: get every line of the metrics as it is written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.best = self.path / "best.safetensors"
        self.last = self.path / "last.safetensors"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self.command, self.title = command_line(), ""
        start = command_words("train") if n_processes() == 1 else [*launcher(), "train.py"]
        self.go_on = shlex.join([*start, "--resume", str(self.path)])
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    @classmethod
    def create(cls, config: Config, data_name: str, command: str | None = None) -> "RunFolder":
        """Make `out_dir/<data_name>_<timestamp>` and begin a run there.

        Args:
            command: that makes this run alone; None is the one that was typed.
        """
        run = cls(new_folder(config.out_dir, data_name))
        run.command = command or run.command
        run.begin(config)
        return run

    def begin(self, config: Config) -> None:
        """Say in the new folder what is run, and where."""
        self.write_config(config)
        about = environment(self.command)
        write_text(self.path / "environment.json", json.dumps(about, indent=1) + "\n")

    def write_config(self, config: Config, changes: Sequence[Mapping[str, Any]] = ()) -> None:
        """Replace config.json by the values in force and the record of how they changed."""
        text = config.to_json()
        if changes:
            rows = ",\n  ".join(map(json.dumps, changes))
            text = text.removesuffix("\n}\n") + f',\n "{CHANGES}": [\n  {rows}\n ]\n}}\n'
        write_text(self.config_file, text)

    def changes(self) -> list[dict[str, Any]]:
        """That record, in the order in which the run was resumed."""
        return read_json_object(self.config_file).get(CHANGES, [])

    def remove_temporary_files(self) -> None:
        """What a process that was killed while it saved has left."""
        for file in (*self.path.glob(".*tmp*"), *self.checkpoints.glob(".*tmp*")):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """A folder that is there; raises UserError if it is no run folder."""
        if is_in_hub(path):
            raise UserError(
                f"{path}: only the weights are in the hub; start a new run from them with"
                f" --init_from {path}"
            )
        run = cls(path)
        if not run.config_file.is_file():
            raise UserError(f"{path}: not a run folder (it has no config.json)")
        return run

    @property
    def name(self) -> str:
        """The last part of the path, with links followed."""
        return self.path.resolve().name

    def log(self, message: str) -> None:
        """One line for people: on standard output (above a progress bar) and in log.txt."""
        self.say(message)
        self.note(message)

    def say(self, message: str) -> None:
        """One line for people on standard output alone."""
        from tqdm import tqdm

        tqdm.write(message)

    def note(self, message: str) -> None:
        """One line in log.txt alone."""
        append_line(self.path / "log.txt", f"{datetime.now():%Y-%m-%d %H:%M:%S}  {message}")

    def write_metrics(self, **values: Any) -> None:
        """Append a line of JSON to metrics.jsonl."""
        append_line(self.metrics_file, json.dumps(values))
        for hear in tuple(self.listeners):
            hear(values)

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl; a line torn by a crash is left out."""
        rows = []
        if self.metrics_file.is_file():
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except (ValueError, RecursionError):
                    break
        return rows

    def drop_metrics_after(self, step: int, evaluated_step: int) -> None:
        """Forget what a run wrote after the checkpoint from which it is resumed.

        A checkpoint saved on Ctrl-C may stand before the evaluation that is due at its step.
        """
        # A sample of the step that is gone on from is written again, as the same text.
        limits = {"train": step, "eval": evaluated_step, "scales": evaluated_step}
        limits["sample"] = step - 1
        rows = self.metrics()
        # A run that is trained longer keeps the results of its first end, but not a half-written
        # conclusion.
        ends = {row["step"] for row in rows if row["event"] == "end"}
        kept = [
            row
            for row in rows
            if (
                row["step"] <= limits[row["event"]]
                if row["event"] in limits and "best_step" not in row
                else row["step"] in ends
            )
        ]
        write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in kept))


class SilentRunFolder(RunFolder):
    """The folder of a run for a process that leaves it to the first one to write there.

    With `log_file` it keeps a log of its own.
    """

    log_file: Path | None = None

    def say(self, message: str) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        if self.log_file is not None:
            append_line(self.log_file, f"{datetime.now():%Y-%m-%d %H:%M:%S}  {message}")

    def write_config(self, config: Config, changes: Sequence[Mapping[str, Any]] = ()) -> None:
        """Nothing."""

    def write_metrics(self, **values: Any) -> None:
        self.note(json.dumps(values))

    def drop_metrics_after(self, step: int, evaluated_step: int) -> None:
        """Nothing."""

    def remove_temporary_files(self) -> None:
        """Nothing."""


def new_folder(parent: str | Path, name: str) -> Path:
    """Make `parent/<name>_<timestamp>`, numbered if two are made in one second."""
    base = Path(parent).expanduser() / f"{name}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    path, number = base, 2
    try:
        while True:
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                path, number = base.with_name(f"{base.name}_{number}"), number + 1
    except OSError as error:
        raise as_user_error(error, path) from error


def check_folder(path: str | Path) -> None:
    """Raise `UserError` where no file could be made in this folder, or the folder itself."""
    folder = Path(path).expanduser().absolute()
    try:
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no folder")
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise as_user_error(error, folder) from error
