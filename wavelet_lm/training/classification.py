"""Training a classifier of sequences, and what it gets right."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wavelet_lm.config import TrainingConfig
from wavelet_lm.data.tasks.examples import Examples
from wavelet_lm.devices import reading
from wavelet_lm.errors import UserError
from wavelet_lm.models.classifier.model import SequenceClassifier
from wavelet_lm.training.optimizers import Optimizer
from wavelet_lm.training.precision import Precision
from wavelet_lm.training.schedule import learning_rate

Score = Callable[[Tensor, Tensor], float]

# How many training losses make the mean that a line of the log shows.
LOG_STEPS = 20


@dataclass
class Training:
    """What `train` did.

    curve: a row per validation with step, train_loss (mean nats since the row before), valid score
    and seconds; best_step: of the highest score, whose weights the model has; seconds: of training
    alone.
    """

    curve: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    seconds: float = 0.0


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of sequences whose largest logit [N, n_classes] is that of their class [N]."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def majority_rate(labels: np.ndarray) -> float:
    """The accuracy of always naming the most frequent of these classes [N]."""
    return np.bincount(labels).max() / len(labels)


def training_order(n: int, seed: int) -> Iterator[int]:
    """Example numbers without end: all of them in a random order, again in another, and so on."""
    epoch = 0
    while True:
        yield from np.random.default_rng((seed, epoch)).permutation(n)
        epoch += 1


def train(
    model: SequenceClassifier,
    training: Examples,
    validation: Examples,
    config: TrainingConfig,
    *,
    steps: int,
    score: Score = accuracy,
    progress: Callable[[str], object] | None = None,
) -> Training:
    """Train the model on the device where it is, and leave it with its best weights.

    `optimizer`, `lr`, its warm-up and cosine, `grad_clip`, `micro_batch_size`, `grad_accum`, mixed
    precision, `seed` and `eval_interval` are as the config says; nothing is compiled, for every
    batch has a length of its own.

    Args:
        score: of logits and labels of the whole validation split; the higher, the better.
        progress: called after each step with what to show beside a progress bar.

    Raises:
        UserError: the loss is no longer finite.
    """
    device = next(model.parameters()).device
    precision, optimizer = Precision(config, device), Optimizer(model, config)
    order = training_order(len(training), config.seed)
    result = Training()
    best_score, best_weights = -math.inf, {}
    losses: list[Tensor] = []
    shown = ""
    for step in range(1, steps + 1):
        started = time.perf_counter()
        optimizer.set_lr(learning_rate(config, step - 1, steps))
        losses.append(_update(model, training, order, config, precision, optimizer))
        result.seconds += time.perf_counter() - started
        due = step % config.eval_interval == 0 or step == steps
        if due or step % LOG_STEPS == 0:
            loss = _mean_loss(losses, step, config)
            shown = f"loss {loss:.3f}" + (f", valid {best_score:.3f}" if best_weights else "")
        if due:
            logits, labels = predict(model, validation, config)
            value = score(logits, labels)
            row = {"step": step, "train_loss": loss, "valid": value, "seconds": result.seconds}
            result.curve.append(row)
            losses.clear()
            if value > best_score:
                best_score, result.best_step = value, step
                best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if progress is not None:
            progress(shown)
    model.load_state_dict(best_weights)
    return result


def train_with_bar(
    name: str,
    model: SequenceClassifier,
    training: Examples,
    validation: Examples,
    config: TrainingConfig,
    score: Score = accuracy,
) -> Training:
    """`train` for as long as the config says, with a progress bar.

    Raises:
        UserError: what `train` raises, and too little memory on the GPU.
    """
    from tqdm import tqdm

    steps = total_steps(config, len(training))
    with tqdm(total=steps, desc=name, unit="step", disable=None, leave=False) as bar:

        def progress(words: str) -> None:
            bar.set_postfix_str(words, refresh=False)
            bar.update()

        try:
            return train(
                model, training, validation, config, steps=steps, score=score, progress=progress
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU ran out of memory with {name}; lower micro_batch_size"
                f" ({config.micro_batch_size}) and raise grad_accum to match"
            ) from error


def total_steps(config: TrainingConfig, n: int) -> int:
    """Optimizer steps: `max_steps`, or `epochs` passes over n examples."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, round(config.epochs * n / (config.micro_batch_size * config.grad_accum)))


def _update(
    model: SequenceClassifier,
    training: Examples,
    order: Iterator[int],
    config: TrainingConfig,
    precision: Precision,
    optimizer: Optimizer,
) -> Tensor:
    """One optimizer step; its loss, still on the device."""
    device = precision.device
    total = torch.zeros((), device=device)
    for _ in range(config.grad_accum):
        indices = list(islice(order, config.micro_batch_size))
        batch = [t.to(device, non_blocking=True) for t in training.batch(indices)]
        with precision.autocast():
            loss = model.loss(*batch) / config.grad_accum
        precision.backward(loss)
        total += loss.detach()
    precision.update(optimizer, model, config.grad_clip)
    optimizer.zero_grad()
    return total


def _mean_loss(losses: list[Tensor], step: int, config: TrainingConfig) -> float:
    loss = torch.stack(losses).mean().item()
    if not math.isfinite(loss):
        raise UserError(
            f"training diverged: the loss is {loss} at step {step}; lower lr ({config.lr}) or raise"
            f" warmup_fraction ({config.warmup_fraction})"
        )
    return loss


def predict(
    model: SequenceClassifier, examples: Examples, config: TrainingConfig
) -> tuple[Tensor, Tensor]:
    """Logits [N, n_classes] float32 and labels of all examples, on the CPU, in their order."""
    precision = Precision(config, next(model.parameters()).device)
    logits: list[Tensor] = []
    # Sequences of about one length side by side, so that little is computed for the padding.
    order = np.argsort(examples.lengths, kind="stable")
    with reading(model):
        for start in range(0, len(order), config.micro_batch_size):
            batch = examples.batch(order[start : start + config.micro_batch_size])
            inputs, lengths = (t.to(precision.device) for t in batch[:2])
            with precision.autocast():
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
