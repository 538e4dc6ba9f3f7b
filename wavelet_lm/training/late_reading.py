"""Numbers that the host reads a step later than the device has them."""

import torch
from torch import Tensor


class LateReading:
    """A copy of a tensor of numbers on its way to the host.

    On CUDA `read` waits for what was queued before the copy, and not for what was queued after it,
    as `float(tensor)` would.

    Args:
        values: [N] floats on any device; from here on they may change.
    """

    def __init__(self, values: Tensor):
        self._event: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._values = values.clone()
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """The numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
