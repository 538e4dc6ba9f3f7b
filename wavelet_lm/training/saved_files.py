"""What a run has saved to go on from, by one process or by several, and what of it is kept.

One process writes `last.safetensors`; several write folders in `checkpoints/`, where the older ones
of both are, too, if `keep_checkpoints` asks for more than one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from wavelet_lm.atomic_files import as_user_error
from wavelet_lm.models.checkpoint import Checkpoint, save_checkpoint
from wavelet_lm.training.checkpoint_folder import checkpoint_name, forget_older, saved_steps
from wavelet_lm.training.processes import ALONE, Processes
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.weights import Saved, Weights


class FileSaver:
    """Saves the state of one process to `last.safetensors`."""

    def __init__(self, run: RunFolder, keep: int):
        self._run, self._keep = run, keep

    def save(
        self,
        model: nn.Module,
        weights: Weights,
        metadata: dict[str, Any],
        extra: dict[str, Tensor],
    ) -> None:
        """Write it; `metadata` is JSON-ready, `extra` has the tensors beside the weights.

        Raises:
            UserError: the disk is full or the folder cannot be written; an older file is kept.
        """
        save_checkpoint(self._run.last, model, metadata, extra)
        keep_file(self._run, metadata["step"], self._keep)

    def finish(self) -> None:
        """Wait until all is written, and leave `last.safetensors` with the weights of now."""


def keep_file(run: RunFolder, step: int, keep: int) -> None:
    """After `last.safetensors` was written by one process: the older ones that are to be kept.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = run.checkpoints
    if keep == 1 and not folder.is_dir():
        return
    try:
        folder.mkdir(exist_ok=True)
        if keep > 1:
            name = f"{checkpoint_name(folder, step)}.safetensors"
            try:
                (folder / name).hardlink_to(run.last)
            except OSError:  # a file system without links
                shutil.copyfile(run.last, folder / f".{name}.tmp")
                (folder / f".{name}.tmp").rename(folder / name)
        forget_older(folder, keep if keep > 1 else 0)
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise as_user_error(error, folder) from error


def newest(run: RunFolder, processes: Processes = ALONE) -> Saved | None:
    """The checkpoint that a run goes on from, None where it has none.

    Raises:
        UserError: it is damaged.
    """
    sharded = [(step, path) for step, _, path in saved_steps(run.checkpoints) if path.is_dir()]
    file = Checkpoint(run.last) if run.last.is_file() else None
    if sharded:
        step, path = sharded[-1]
        # What several processes leave there at their end has weights alone.
        holds_state = file is not None and "total_steps" in file.metadata
        if not holds_state or step >= file.metadata["step"]:
            from wavelet_lm.training.sharded_checkpoint import ShardedCheckpoint

            return ShardedCheckpoint(path, processes)
    return file


def described(run: RunFolder) -> Iterator[str]:
    """The files that are left of a run, with their steps, for people."""
    saved = [(step, path) for step, _, path in saved_steps(run.checkpoints) if path.is_dir()]
    if saved:
        yield f"{saved[-1][1]} (step {saved[-1][0]})"
    for file in (run.last, run.best):
        if file.is_file():
            yield f"{file} (step {Checkpoint(file).metadata['step']})"
