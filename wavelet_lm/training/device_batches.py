"""Batches on their way to the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from wavelet_lm.training.task import MicroBatch


class DeviceBatches:
    """`batches[step]` are the micro-batches of a step on the device.

    What `fetch` is told is read and copied while the device still computes, and is there when it is
    asked for.

    Args:
        read: the micro-batches of a step, on the CPU.
    """

    def __init__(self, read: Callable[[int], list[MicroBatch]], device: torch.device):
        self._read, self._device = read, device
        self._fetched: dict[int, list[MicroBatch]] = {}

    def fetch(self, step: int) -> None:
        """Start to bring the batch of a step, of one step at a time."""
        parts = self._read(step)
        self._fetched = {step: [tuple(to_device(t, self._device) for t in part) for part in parts]}

    def __getitem__(self, step: int) -> list[MicroBatch]:
        if step not in self._fetched:
            self.fetch(step)
        return self._fetched.pop(step)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor of any shape on the device; to a GPU without waiting for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
