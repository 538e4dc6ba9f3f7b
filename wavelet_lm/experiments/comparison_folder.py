"""The folder of several models that are trained on one task: a run folder for each of them.

`comparison.json` says which command made it, and with which arguments, so that `--resume` can go on
with all of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from wavelet_lm.atomic_files import as_user_error, write_text
from wavelet_lm.config import Config, read_json_object
from wavelet_lm.errors import UserError
from wavelet_lm.training.provenance import command_line
from wavelet_lm.training.run_folder import RunFolder, new_folder

FILE = "comparison.json"


class ModelRun(RunFolder):
    """The run of one of the models, which speaks to its log alone: a table is what is printed."""

    def log(self, message: str) -> None:
        self.note(message)

    def is_finished(self) -> bool:
        """Whether its last step was taken."""
        return any(row["event"] == "end" for row in self.metrics())


class ComparisonFolder:
    """Where the runs of a comparison are.

    Args:
        arguments: that were typed after the command.

    Attributes:
        go_on: the command that goes on with all runs.
    """

    def __init__(self, path: Path, arguments: Sequence[str]):
        self.path, self.arguments = path, list(arguments)
        self.go_on = command_line(["--resume", str(path)])

    @classmethod
    def create(cls, out_dir: str, kind: str, arguments: Sequence[str]) -> ComparisonFolder:
        """Make `out_dir/<kind>_<timestamp>`; kind: the command, such as lra."""
        folder = cls(new_folder(out_dir, kind), arguments)
        about = {"kind": kind, "command": command_line(), "arguments": folder.arguments}
        write_text(folder.path / FILE, json.dumps(about, indent=1) + "\n")
        return folder

    @classmethod
    def open(cls, path: str | Path, kind: str) -> ComparisonFolder:
        """One that is there.

        Raises:
            UserError: it is none, or not of this command.
        """
        file = Path(path).expanduser() / FILE
        if not file.is_file():
            raise UserError(f"{path}: not the folder of a comparison (it has no {FILE})")
        about = read_json_object(file)
        arguments = about.get("arguments")
        if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments):
            raise UserError(f"{file}: is damaged: its arguments are no list of words")
        if about.get("kind") != kind:
            raise UserError(f"{path}: is of the command {about.get('kind')}, not of {kind}")
        return cls(file.parent, arguments)

    def run(self, name: str) -> ModelRun:
        """The run of a model, whether or not it has begun."""
        run = ModelRun(self.path / quote(name, safe="+=@:"))
        run.title, run.go_on = name, self.go_on
        return run

    def begin(self, name: str, config: Config) -> ModelRun:
        """A new run of a model, in place of one that has saved nothing."""
        run = self.run(name)
        try:
            shutil.rmtree(run.path, ignore_errors=True)
            run.path.mkdir()
        except OSError as error:
            raise as_user_error(error, run.path) from error
        run.begin(config)
        return run

    def remove_if_empty(self) -> None:
        """Leave no folder of a comparison in which no model could be built."""
        if not any(path.is_dir() for path in self.path.iterdir()):
            shutil.rmtree(self.path)
