"""The training state of several processes: a folder of shares, written while training goes on.

`checkpoints/step_00000500` in a run folder holds `state.json`, which says what the header of a
checkpoint file says, and what `torch.distributed.checkpoint` writes, in its safetensors form: a
file per process, each tensor with the place that it has in the whole one. So any number of
processes, one among them, can read it. It is written under a name that starts with a dot and
renamed when all is there: what has its name is whole.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from wavelet_lm.atomic_files import as_user_error, sync_folder, write_text
from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.json_files import parse_json
from wavelet_lm.models.checkpoint import (
    EXTRA,
    Checkpoint,
    check_kinds,
    check_shapes,
    save_checkpoint,
)
from wavelet_lm.training.checkpoint_folder import STATE, checkpoint_name, forget_older
from wavelet_lm.training.processes import ALONE, Processes
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.weights import Weights

FORMAT = "wavelet_lm.sharded.1"

Target = Callable[[str, torch.Size, torch.dtype], Tensor]


class ShardedSaver:
    """Writes the state of several processes, one at a time, beside the training."""

    def __init__(self, run: RunFolder, keep: int, processes: Processes):
        self._run, self._folder, self._keep = run, run.checkpoints, keep
        self._processes = processes
        # Its collectives run beside those of the training, and must not be taken for them.
        self._group = dist.new_group(backend="gloo")
        # What is being written, and on the first process its getting its name, which comes after.
        self._pending: list[Future] = []
        self._saved: tuple[nn.Module, Weights, dict[str, Any]] | None = None

    def save(
        self,
        model: nn.Module,
        weights: Weights,
        metadata: dict[str, Any],
        extra: dict[str, Tensor],
    ) -> None:
        """Begin to write; what is given may change from here on. For all processes.

        Args:
            metadata: JSON-ready; that of the first process is kept.
            extra: tensors beside the weights: whole ones that are the same in every process, shares
                of whole ones (DTensors), or what this process alone has.

        Raises:
            UserError: the last one could not be written.
        """
        self._finish_writing()
        name = checkpoint_name(self._folder, metadata["step"])
        name = self._processes.told(lambda: name)
        temporary = self._folder / f".{name}.tmp"
        if self._processes.is_main:
            self._begin(temporary, model, metadata)
        self._processes.wait_for_all()
        tensors = weights.shares() | {EXTRA + key: t.detach() for key, t in extra.items()}
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = dcp.async_save(tensors, storage_writer=writer, process_group=self._group)
        self._pending = [written]
        if self._processes.is_main:
            named: Future = Future()
            written.add_done_callback(lambda _: self._end(written, named, temporary, name))
            self._pending.append(named)
        self._saved = (model, weights, {"step": metadata["step"]})

    def finish(self) -> None:
        """Wait until all is written, and leave `last.safetensors` with the weights of now.

        Raises:
            UserError: it could not be written.
        """
        self._finish_writing()
        if self._saved is None:
            return
        model, weights, metadata = self._saved
        whole = weights.gathered()
        if self._processes.is_main:
            save_checkpoint(self._run.last, model, metadata, weights=whole)
        self._processes.wait_for_all()

    def _finish_writing(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        errors = [error for done in pending if (error := done.exception()) is not None]
        self._processes.wait_for_all()  # until the first process has renamed it
        if errors:
            raise _as_user_error(errors[0], self._folder)

    def _begin(self, temporary: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            raise as_user_error(error, temporary) from error
        state = {
            "format": FORMAT,
            "processes": self._processes.size,
            "vocab_size": model.vocab_size,
            "config": model.config.to_dict(),
            "metadata": metadata,
        }
        write_text(temporary / STATE, json.dumps(state, indent=1) + "\n")

    def _end(self, written: Future, named: Future, temporary: Path, name: str) -> None:
        """In the thread that wrote: nobody else would hear of an error."""
        try:
            if written.exception() is None:
                self._name(temporary, name)
            else:
                shutil.rmtree(temporary, ignore_errors=True)
        except Exception as error:
            named.set_exception(error)
        else:
            named.set_result(None)

    def _name(self, temporary: Path, name: str) -> None:
        sync_folder(temporary)
        temporary.rename(self._folder / name)
        sync_folder(self._folder)
        forget_older(self._folder, self._keep)
        last = self._run.last
        if last.is_file() and "total_steps" in Checkpoint(last).metadata:
            last.unlink()  # the state of an earlier step, when one process trained


def _as_user_error(error: BaseException, folder: Path) -> UserError:
    """The one line for what a process could not write."""
    if isinstance(error, OSError):
        return as_user_error(error, folder)
    for rank, (cause, _) in getattr(error, "failures", {}).items():
        if isinstance(cause, OSError):
            return UserError(f"rank {rank}: {as_user_error(cause, folder / STATE)}")
    return UserError(f"{folder}: no checkpoint was written ({cause_of(error)})")


def cause_of(error: BaseException) -> str:
    """Why a checkpoint could not be read or written, in one line."""
    for rank, (cause, _) in getattr(error, "failures", {}).items():
        return f"rank {rank}: {cause_of(cause)}"
    words = str(error).strip().split("\n")[0]
    return words or type(error).__name__


class ShardedCheckpoint:
    """A folder that `ShardedSaver` wrote, with the face of a `Checkpoint`.

    Raises:
        UserError: it is damaged, or of another version.
    """

    def __init__(self, path: Path, processes: Processes = ALONE):
        self.path, self._processes = path, processes
        try:
            text = (path / STATE).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        state = parse_json(text, str(path / STATE))
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise UserError(f"{path / STATE}: no state of this version, which reads {FORMAT!r}")
        if not all(isinstance(state.get(key), dict) for key in ("config", "metadata")):
            raise self.damaged("it has no config and metadata")
        self.config = Config.from_dict(state["config"], source=str(path))
        self.metadata: dict[str, Any] = state["metadata"]
        self.vocab_size = state.get("vocab_size")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
        try:
            self._stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        except Exception as error:
            raise self.damaged(cause_of(error)) from None

    def damaged(self, problem: str) -> UserError:
        """The error of a state that cannot be."""
        return UserError(f"{self.path}: this checkpoint is damaged ({problem}); remove it")

    def require(self, kinds: dict[str, tuple[type, ...]]) -> None:
        """Raise `UserError` unless the metadata has these keys, each of one of its types."""
        check_kinds(self.metadata, kinds, self.damaged)

    def load_into(self, model: nn.Module) -> None:
        """Copy the weights into a model of the same shape, or each process's shares of them.

        Raises:
            UserError: it is a checkpoint of another config.
        """
        stored = {n: list(m.size) for n, m in self._stored.items() if not n.startswith(EXTRA)}
        check_shapes(stored, model, self.path)
        self._read({name: p.detach() for name, p in model.named_parameters()})

    def extra(self, target: Target | None = None) -> dict[str, Tensor]:
        """The tensors beyond the weights, by name without their prefix.

        Args:
            target: of name, shape and dtype, an empty tensor to read one into, maybe a share.
        """
        target = target or (lambda name, shape, dtype: torch.empty(shape, dtype=dtype))
        read = {
            name: target(name.removeprefix(EXTRA), m.size, m.properties.dtype)
            for name, m in self._stored.items()
            if name.startswith(EXTRA)
        }
        self._read(read)
        return {name.removeprefix(EXTRA): t for name, t in read.items()}

    def _read(self, targets: dict[str, Tensor]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                dcp.load(
                    targets,
                    storage_reader=HuggingFaceStorageReader(str(self.path)),
                    no_dist=self._processes.size == 1,
                )
            except (Exception, CheckpointException) as error:
                raise self.damaged(cause_of(error)) from None
