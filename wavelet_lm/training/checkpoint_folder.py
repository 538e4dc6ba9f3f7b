"""The folder `checkpoints` of a run: what is whole there, the name of the next, what goes."""

import re
import shutil
from pathlib import Path

STATE = "state.json"
NAME = re.compile(r"step_(\d{8,})(?:_(\d+))?(\.safetensors)?")


def saved_steps(folder: Path) -> list[tuple[int, int, Path]]:
    """Step, turn and path of every whole checkpoint in a folder, the newest last.

    The turn counts those of one step, as a run that is gone on with otherwise may write.
    """
    if not folder.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(m[1]), int(m[2] or 1), path) for m, path in found if m)


def checkpoint_name(folder: Path, step: int) -> str:
    """The name of the next checkpoint of a step."""
    turns = [turn for saved, turn, _ in saved_steps(folder) if saved == step]
    return f"step_{step:08d}" + (f"_{max(turns) + 1}" if turns else "")


def forget_older(folder: Path, keep: int) -> None:
    """Remove all but so many of the newest checkpoints in a folder."""
    saved = saved_steps(folder)
    for _, _, path in saved[: max(0, len(saved) - keep)]:
        if path.is_dir():
            # Under another name first, so that nothing half-removed is taken for whole.
            doomed = path.with_name(f".{path.name}.old.tmp")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
