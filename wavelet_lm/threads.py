"""How many threads compute on the CPU: the key and the flag `threads`."""

from __future__ import annotations

import os
from functools import cache

from wavelet_lm.environment import COUNT_VARIABLES, available_cpus


def use_threads(threads: int | str) -> None:
    """Compute with so many from here on.

    `auto` is PyTorch's own choice (of the affinity, cores and not their hyperthreads), but no more
    than the control group's quota can run; where the user's environment says a number, that one.
    """
    import torch

    default = _torch_default()
    if threads == "auto":
        chosen = any(name in os.environ for name in COUNT_VARIABLES)
        threads = default if chosen else min(default, available_cpus())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


@cache
def _torch_default() -> int:
    """What PyTorch had before `use_threads` was first called."""
    import torch

    return torch.get_num_threads()
