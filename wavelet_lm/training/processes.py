"""One process, or several that train one model together, and what they settle among themselves.

`torchrun`, `accelerate launch` and whatever else starts several set RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT; where WORLD_SIZE is missing or 1 there is one process, and nothing of
`torch.distributed` is used. This module imports none of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from wavelet_lm.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Made = TypeVar("Made")


class Processes:
    """One process alone; `ProcessGroup` (`process_group.py`) is several behind the same face.

    Attributes:
        rank, size: the number of this process among all of them, from 0, and how many there are.
        local_rank: its number on its own machine.
    """

    rank = local_rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0

    def own(self, n: int) -> slice:
        """Which of n things in one order are this process's."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def device_name(self, name: str) -> str:
        """The device of this process, where the config names one for all."""
        return name

    def connect(self, device: torch.device) -> None:
        """Make ready to compute together, each on a device of this type."""

    def seed(self, seed: int, step: int = 0) -> None:
        """Give each process but the first random numbers of its own, from a step on."""

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes of a tensor of one shape, which it may change; for all."""
        return values

    def joined(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of every process one after the other, as many of each; for all."""
        return rows

    def told(self, value: Callable[[], Any]) -> Any:
        """What the first process makes of this, JSON-ready; for all."""
        return value()

    def in_turn(self, make: Callable[[], Made]) -> Made:
        """What each process makes, the first one of each machine before the others there."""
        return make()

    def wait_for_all(self) -> None:
        """Go on when every process is here."""


ALONE = Processes()


def n_processes() -> int:
    """How many were started together, as the environment says.

    Raises:
        UserError: WORLD_SIZE is no whole number.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or size == "0":
        raise UserError(f"WORLD_SIZE is {size!r}; it must be a whole number from 1")
    return int(size)


def one_process_only(what: str) -> None:
    """Raise `UserError` in a command that several processes cannot share, in the first of them."""
    size = n_processes()
    if os.environ.get("RANK", "0") != "0":
        raise SystemExit(2)
    if size > 1:
        raise UserError(
            f"{what} runs in one process and {size} were started; start it without torchrun"
        )


def command_words(name: str) -> list[str]:
    """The words that start a command, as this one was started: by `wavelet-lm`, or by its file."""
    if sys.argv[0].startswith("wavelet-lm "):
        return ["wavelet-lm", name]
    return ["python", f"{name}.py"]


def launcher() -> list[str]:
    """The words that start a command in as many processes as now: `python`, or `torchrun …`."""
    size = n_processes()
    if size == 1:
        return ["python"]
    on_one = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    nodes = [] if on_one == size else [f"--nnodes={size // on_one}"]
    return ["torchrun", *nodes, f"--nproc_per_node={on_one}"]
