"""The task of a classifier of sequences, and what it gets right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavelet_lm.config import Config, TrainingConfig
from wavelet_lm.data.batches import ShuffledExamples, batch_size
from wavelet_lm.data.tasks.examples import Examples, Splits
from wavelet_lm.devices import amp_dtype, autocast, reading
from wavelet_lm.errors import UserError
from wavelet_lm.models.checkpoint import Checkpoint
from wavelet_lm.models.classifier.model import SequenceClassifier
from wavelet_lm.training.task import MicroBatch, Task, Validation

Score = Callable[[Tensor, Tensor], float]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of sequences whose largest logit [N, n_classes] is that of their class [N]."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def majority_rate(labels: np.ndarray) -> float:
    """The accuracy of always naming the most frequent of these classes [N]."""
    return np.bincount(labels).max() / len(labels)


def total_steps(config: TrainingConfig, n: int) -> int:
    """Optimizer steps: `max_steps`, or `epochs` passes over n examples."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, round(config.epochs * n / batch_size(config)))


class Classification(Task):
    """Cross-entropy of a classifier; the best weights have the highest score.

    Nothing is compiled, for every batch has a length of its own.

    Args:
        data: the splits; `test` is only kept in mind.
        score: of logits and labels of the whole validation split; the higher, the better.
    """

    unit = "sequences"
    validates_untrained = False

    def __init__(
        self,
        config: Config,
        model: SequenceClassifier,
        data: Splits,
        device: torch.device,
        score: Score = accuracy,
    ):
        super().__init__(config, model, device)
        self.data, self.score = data, score
        self.per_step = batch_size(config)
        self.examples = ShuffledExamples(len(data.train), self.per_step, config.seed)

    def batch(self, step: int) -> list[MicroBatch]:
        parts = np.split(self.examples[step], self.config.grad_accum)
        return [self.data.train.batch(part) for part in parts]

    def losses(self, step: int, batch: list[MicroBatch]) -> Iterator[Tensor]:
        for examples in batch:
            with self.autocast():
                loss = self.model.loss(*examples)
            yield loss

    def validate(self) -> Validation:
        score = self.score(*predict(self.model, self.data.valid, self.config))
        return Validation(-score, {"score": score}, [f"valid {score:.4f}"])

    # --- what a resumed run needs -----------------------------------------------------------------

    @property
    def _keys(self) -> dict[str, str]:
        return {part: getattr(self.data, part).key for part in ("train", "valid", "test")}

    def saved(self) -> dict[str, Any]:
        return {"data": self._keys}

    def check_data(self, checkpoint: Checkpoint) -> None:
        checkpoint.require({"data": (dict,)})
        for split, key in self._keys.items():
            if checkpoint.metadata["data"].get(split) != key:
                raise UserError(
                    f"{checkpoint.path}: the data changed: the {split} examples are not those that"
                    " this run began with; put them back, or start again"
                )


def predict(
    model: SequenceClassifier, examples: Examples, config: TrainingConfig
) -> tuple[Tensor, Tensor]:
    """Logits [N, n_classes] float32 and labels of all examples, on the CPU, in their order."""
    device = next(model.parameters()).device
    dtype = amp_dtype(config, device)
    logits: list[Tensor] = []
    # Sequences of about one length side by side, so that little is computed for the padding.
    order = np.argsort(examples.lengths, kind="stable")
    with reading(model):
        for start in range(0, len(order), config.micro_batch_size):
            batch = examples.batch(order[start : start + config.micro_batch_size])
            inputs, lengths = (t.to(device) for t in batch[:2])
            with autocast(device, dtype):
                logits.append(model(inputs, lengths).float().cpu())
    in_order = torch.cat(logits)[torch.from_numpy(np.argsort(order))]
    return in_order, torch.from_numpy(examples.labels)


def judge(model: SequenceClassifier, examples: Examples, config: TrainingConfig) -> dict[str, Any]:
    """Accuracy on a split, with the rate of its most frequent class beside it."""
    logits, labels = predict(model, examples, config)
    return {
        "examples": len(examples),
        "accuracy": accuracy(logits, labels),
        "majority": majority_rate(examples.labels),
    }
