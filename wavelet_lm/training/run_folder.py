"""The folder of one run: config, environment, logs, metrics, checkpoints."""

import errno
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from wavelet_lm.atomic_files import append_line, as_user_error, write_text
from wavelet_lm.config import CHANGES, Config, read_json_object
from wavelet_lm.errors import UserError

# What a result depends on in a checkout, besides the config, which a run keeps itself.
CODE = (":(top)*.py", ":(top)pyproject.toml", ":(top)constraints.txt")


class RunFolder:
    """Paths and writers of a run folder; `log` speaks to the terminal and to `log.txt`."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.best = self.path / "best.safetensors"
        self.last = self.path / "last.safetensors"
        self.tokenizer = self.path / "tokenizer"
        self.command = command_line()

    @classmethod
    def create(cls, config: Config, data_name: str, command: str | None = None) -> "RunFolder":
        """Make `out_dir/<data_name>_<timestamp>`, numbered if two runs start in one second.

        Args:
            command: that makes this run alone; None is the one that was typed.
        """
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        base = Path(config.out_dir).expanduser() / f"{data_name}_{stamp}"
        path, number = base, 2
        try:
            while True:
                try:
                    path.mkdir(parents=True)
                    break
                except FileExistsError:
                    path, number = base.with_name(f"{base.name}_{number}"), number + 1
        except OSError as error:
            raise as_user_error(error, path) from error
        run = cls(path)
        run.command = command or run.command
        run.write_config(config)
        write_text(
            run.path / "environment.json", json.dumps(environment(run.command), indent=1) + "\n"
        )
        return run

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
        for file in self.path.glob(".*tmp*"):
            file.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        run = cls(path)
        if not run.config_file.is_file():
            raise UserError(f"{path}: not a run folder (it has no config.json)")
        return run

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def log(self, message: str) -> None:
        """One line for people: on standard output (above a progress bar) and in log.txt."""
        from tqdm import tqdm

        tqdm.write(message)
        self.note(message)

    def note(self, message: str) -> None:
        """One line in log.txt alone."""
        append_line(self.path / "log.txt", f"{datetime.now():%Y-%m-%d %H:%M:%S}  {message}")

    def write_metrics(self, **values: Any) -> None:
        append_line(self.metrics_file, json.dumps(values))

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
        limits = {"train": step, "eval": evaluated_step}
        rows = self.metrics()
        # A run that is trained longer keeps the results of its first end, but not a half-written
        # conclusion.
        ends = {row["step"] for row in rows if row["event"] == "end"}
        kept = [
            row
            for row in rows
            if (
                row["step"] <= limits[row["event"]]
                if row["event"] in limits
                else row["step"] in ends
            )
        ]
        write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in kept))


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


def environment(command: str | None = None) -> dict[str, Any]:
    """What a result depends on besides the config.

    Args:
        command: that makes it; None is the one that was typed.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command or command_line(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command as it was typed, starting with `python`; of paths in this folder what is in it.

    It can then be typed again in another clone.

    Args:
        arguments: take the place of those that were typed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    program = [os.path.relpath(sys.argv[0])]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin == sys.argv[0]:  # run by -m
        program = ["-m", spec.name.removesuffix(".__main__")]
    if sys.argv[0].startswith("wavelet-lm "):
        return shlex.join([*sys.argv[0].split(), *map(_relative, arguments)])
    return shlex.join(["python", *program, *map(_relative, arguments)])


def _relative(word: str) -> str:
    """A word of a command line; the path of a file or folder in this one is made relative."""
    flag, sign, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if path.is_absolute() and path.is_relative_to(Path.cwd()) and os.path.lexists(path):
        value = os.path.relpath(path)
    return f"{flag}{sign}{value}"


def commit() -> str | None:
    """The commit of the code, with `+` where the code differs from it; None outside git.

    Tables and figures that runs and benchmarks add to are no code, nor are documents.
    """

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
            )
        except OSError:
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return head + ("+" if changed else "")


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
