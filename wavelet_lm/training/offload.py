"""Optimizer state that waits in the CPU's memory while its weight does not step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wavelet_lm.errors import UserError


def refuse_offload_to_itself(device: torch.device) -> None:
    """Raise UserError where the state is in the CPU's memory anyway."""
    if device.type == "cpu":
        raise UserError(
            "optimizer_offload keeps the optimizer's state in the CPU's memory, where device cpu"
            " has it already; leave it out"
        )


@contextmanager
def brought(state: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Inside, the state of one weight is on the device; what became of it is on the CPU after.

    Nothing is waited for: to and from a GPU it is copied in the order of its stream, from and to
    memory that is pinned. Scalars stay where they are.

    Args:
        state: tensors and scalars by name, changed in place.
    """
    waiting = {key: t for key, t in state.items() if _moves(t)}
    state.update({key: t.to(device, non_blocking=True) for key, t in waiting.items()})
    yield
    for key, value in state.items():
        if _moves(value):
            host = waiting[key] if key in waiting else _host(value)
            state[key] = host.copy_(value, non_blocking=True)


def kept(value: Any, device: torch.device) -> Any:
    """A copy of a part of a saved state as `brought` leaves it there."""
    if not isinstance(value, Tensor):
        return value
    return _host(value, device.type).copy_(value) if value.ndim else value.to(device, copy=True)


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _host(like: Tensor, device_type: str | None = None) -> Tensor:
    pinned = (device_type or like.device.type) == "cuda"
    return torch.empty_like(like, device="cpu", pin_memory=pinned)
