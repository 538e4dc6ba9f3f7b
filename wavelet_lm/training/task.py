"""What a model is trained for: all that the loop (`loop.py`) does not know itself."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wavelet_lm import devices
from wavelet_lm.config import Config
from wavelet_lm.data.batches import passes_per_step
from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.training.processes import ALONE, Processes
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.weights import Weights

MicroBatch = tuple[Tensor, ...]


class Validation(NamedTuple):
    """What a validation found.

    loss: that of which the best weights have least; row: figures for metrics.jsonl; words: the same
    for people.
    """

    loss: float
    row: dict[str, Any]
    words: list[str]


class Task:
    """Batches, the loss of one, and a validation, of one model on the device where it is trained.

    A task computes under `autocast`. Its batches are a pure function of the step, so that a resumed
    run reads the same ones; what else it needs to go on is what it saves.

    Attributes:
        unit, per_step: what the speed counts, and how many of them a step reads.
        worst_loss: of a batch; above it training has left the region from which it recovers.
        validates_untrained: whether a run begins with a validation.
        n_passes: forward passes that this process does in a step.
    """

    unit: str
    per_step: int
    worst_loss = math.inf
    validates_untrained = True

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        device: torch.device,
        processes: Processes = ALONE,
    ):
        self.config, self.model, self.device = config, model, device
        self.processes = processes
        self.n_passes = passes_per_step(config, processes.size)
        self.autocast = partial(devices.autocast, device, devices.amp_dtype(config, device))

    def batch(self, step: int) -> list[MicroBatch]:
        """The `n_passes` micro-batches of a step (from 0), on the CPU, in the task's shapes."""
        raise NotImplementedError

    def losses(self, step: int, batch: list[MicroBatch]) -> Iterator[Tensor]:
        """The mean loss of each micro-batch in turn, 0-d with its graph; the loop goes backward.

        Args:
            batch: that of the step, on the device.
        """
        raise NotImplementedError

    def validate(self) -> Validation:
        """The weights of now, without dropout; no random number is drawn."""
        raise NotImplementedError

    def sample(self, run: RunFolder, weights: Weights, step: int) -> dict[str, str]:
        """What the weights of now write, for metrics.jsonl; empty where a task writes nothing.

        No random number is drawn, and the model stays in training. For all processes.
        """
        return {}

    # --- what a resumed run needs -----------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """JSON-ready, for the metadata of `last.safetensors`."""
        return {}

    def saved_tensors(self) -> dict[str, Tensor]:
        """Beside the weights."""
        return {}

    def check_data(self, checkpoint: Checkpoint) -> None:
        """Raise `UserError` unless a checkpoint's run read these data."""

    def validates_otherwise(self, checkpoint: Checkpoint) -> bool:
        """Whether losses of a checkpoint's validation cannot be held against those of now."""
        return False

    def restore(
        self, checkpoint: Checkpoint, tensors: dict[str, Tensor], log: Callable[[str], None]
    ) -> None:
        """The inverse of `saved` and `saved_tensors`; weights and data are those of the run."""
