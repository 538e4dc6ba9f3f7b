"""Batches on their way to the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from wavelet_lm.training.task import MicroBatch


class DeviceBatches:
    """`batches[step]` are the micro-batches of a step on the device.

    What `fetch` is told is read and copied while the device still computes, and is there when it is
    asked for: to a GPU on a stream of its own, which stands behind nothing that is queued already.

    Args:
        read: the micro-batches of a step, on the CPU.
    """

    def __init__(self, read: Callable[[int], list[MicroBatch]], device: torch.device):
        self._read, self._device = read, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._fetched: dict[int, list[MicroBatch]] = {}

    def fetch(self, step: int) -> None:
        """Start to bring the batch of a step, of one step at a time."""
        parts = self._read(step)
        with torch.cuda.stream(self._stream):  # of None: no other than the current one
            batch = [tuple(to_device(t, self._device) for t in part) for part in parts]
        self._fetched = {step: batch}

    def __getitem__(self, step: int) -> list[MicroBatch]:
        if step not in self._fetched:
            self.fetch(step)
        batch = self._fetched.pop(step)
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for part in batch:
                for tensor in part:
                    tensor.record_stream(computing)  # whose memory the other one must not reuse yet
        return batch


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor of any shape on the device; to a GPU without waiting for it."""
    if device.type == "cuda":
        # What is not contiguous would go through a copy in memory that is not pinned, with a wait.
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
