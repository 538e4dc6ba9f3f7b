"""Where a run stands, and what of it is saved beside the weights so that it can go on."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wavelet_lm.errors import UserError
from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.training.optimizers import Optimizer
from wavelet_lm.training.precision import Precision
from wavelet_lm.training.task import Task
from wavelet_lm.training.weights import Saved, Weights

# What has been saved since the first version, and of which type.
SAVED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "total_steps", "evaluated_step", "best_step"), (int,)),
    **dict.fromkeys(("best_loss", "smooth_loss"), (float, int, type(None))),
    "seconds": (float, int),
    **dict.fromkeys(("scaler", "optimizer"), (dict,)),
}


@dataclass
class Progress:
    """Where a run stands.

    step: updates done; evaluated_step: of the last validation, -1 before the first; best_loss,
    best_step: of the best weights, infinite and -1 while there are none; smooth_loss: a moving
    average of the batches' losses; seconds: of training alone.
    """

    total_steps: int
    step: int = 0
    evaluated_step: int = -1
    best_loss: float = math.inf
    best_step: int = -1
    smooth_loss: float | None = None
    seconds: float = 0.0

    def saved(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "evaluated_step": self.evaluated_step,
            "best_loss": self.best_loss if self.best_step >= 0 else None,
            "best_step": self.best_step,
            "smooth_loss": self.smooth_loss,
            "seconds": self.seconds,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """The inverse of `saved`, but for the length, which may have changed."""
        self.step, self.evaluated_step = saved["step"], saved["evaluated_step"]
        self.best_loss = math.inf if saved["best_loss"] is None else saved["best_loss"]
        self.best_step = saved["best_step"]
        self.smooth_loss, self.seconds = saved["smooth_loss"], saved["seconds"]


def collect(
    progress: Progress, task: Task, optimizer: Optimizer, precision: Precision, weights: Weights
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of what a run goes on from, the weights aside."""
    moments, scalars = optimizer.state()
    tensors = {
        name: weights.global_state(name, t)
        for name, t in ((f"optimizer/{name}", t) for name, t in moments.items())
    }
    tensors[generator("cpu", task)] = torch.get_rng_state()
    if task.device.type == "cuda":
        tensors[generator("cuda", task)] = torch.cuda.get_rng_state(task.device)
    metadata = {
        **progress.saved(),
        **task.saved(),
        "scaler": precision.scaler.state_dict(),
        "optimizer": scalars,
    }
    return metadata, tensors | task.saved_tensors()


def generator(device: str, task: Task) -> str:
    """The name of the state of this process's generator; the first one's is that of one alone."""
    rank = task.processes.rank
    return f"generator/{device}" + (f".{rank}" if rank else "")


def require_state(checkpoint: Saved) -> None:
    """Raise `UserError` unless a run can go on from a checkpoint."""
    if "total_steps" not in checkpoint.metadata:
        raise UserError(f"{checkpoint.path}: holds weights only; start a new run with --init_from")
    checkpoint.require(SAVED)


def open_saved(path: Path) -> Checkpoint:
    """The checkpoint file that one process goes on from.

    Raises:
        UserError: it is not whole, or holds weights alone.
    """
    checkpoint = Checkpoint(path)
    require_state(checkpoint)
    return checkpoint


def put_back(
    checkpoint: Saved, task: Task, optimizer: Optimizer, precision: Precision, weights: Weights
) -> dict[str, Tensor]:
    """Give optimizer, random generators and loss scale the state that they had.

    A process that was not there when it was saved has random numbers of its own from here on.

    Returns:
        All saved tensors beside the weights, those of the task among them.

    Raises:
        UserError: the state does not fit the model.
    """
    saved, tensors = checkpoint.metadata, weights.extra(checkpoint)
    moments = {
        name.removeprefix("optimizer/"): t
        for name, t in tensors.items()
        if name.startswith("optimizer/")
    }
    try:
        optimizer.load_state(moments, saved["optimizer"])
        if task.processes.is_main or generator("cpu", task) in tensors:
            torch.set_rng_state(tensors[generator("cpu", task)])
        else:
            task.processes.seed(task.config.seed, saved["step"])
        if saved["scaler"]:  # one that had nothing to scale, as on another device, has no state
            precision.scaler.load_state_dict(saved["scaler"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        problem = str(error).strip().split("\n")[0]
        raise checkpoint.damaged(f"its optimizer or generators do not fit: {problem}") from None
    if generator("cuda", task) in tensors and task.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[generator("cuda", task)], task.device)
    return tensors
