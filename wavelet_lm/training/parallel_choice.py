"""Which way several processes share a model: the key `parallel`, and what `auto` means."""

from __future__ import annotations

import torch

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.training.memory_estimate import (
    available_bytes,
    estimate,
    refuse_what_cannot_train,
)
from wavelet_lm.training.processes import Processes


def refuse_another_number(config: Config, processes: Processes) -> None:
    """Raise `UserError` where `parallel` and the number of processes contradict each other."""
    if processes.size > 1 and config.parallel == "none":
        raise UserError(
            f"parallel is none and {processes.size} processes were started; use --parallel auto, or"
            " start it without torchrun"
        )
    if processes.size == 1 and config.parallel in ("ddp", "fsdp"):
        raise UserError(
            f"parallel is {config.parallel} and there is one process; start several with torchrun"
            " --nproc_per_node=N train.py …, or use --parallel auto"
        )


def chosen_parallel(model: LanguageModel, device: torch.device, processes: Processes) -> str:
    """`none`, `ddp` or `fsdp` for a model, which needs no weights, in these processes.

    Raises:
        UserError: it does not fit in any way, or not in the one that is asked for.
    """
    config = model.config
    if processes.size == 1:
        refuse_what_cannot_train(model, device)
        return "none"
    if config.optimizer_in_backward:
        raise UserError(
            "optimizer_in_backward steps each weight before the processes have added up their"
            " gradients; leave it out, or start one process"
        )
    # Free memory is not the same everywhere; all do what suits the first process.
    kind = processes.told(lambda: _fitting(model, device))
    if kind == "ddp":
        refuse_what_cannot_train(model, device)
        return kind
    if config.optimizer.endswith("8bit"):
        raise UserError(
            f"optimizer {config.optimizer} rounds its state in blocks, which shares of weights"
            " would cut otherwise; with parallel fsdp use Adagrad, AdamW or Muon"
        )
    if config.optimizer_offload:
        raise UserError(
            "optimizer_offload is for whole states; with parallel fsdp use --fsdp_cpu_offload"
        )
    if config.compile is True:
        raise UserError("compile is true and parallel fsdp is not compiled; use --compile auto")
    return kind


def _fitting(model: LanguageModel, device: torch.device) -> str:
    if model.config.parallel != "auto":
        return model.config.parallel
    fits = device.type == "cpu" or estimate(model, device).peak <= available_bytes(device)
    return "ddp" if fits else "fsdp"
