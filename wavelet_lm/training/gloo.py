"""What FSDP2 sends between CPUs, by gloo, without copies of it.

gloo's own forms of these two work on a second tensor of the whole size. Here the part of each
process is sent from where it lies to where it is read, which takes less time, too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def send_in_place(model: nn.Module) -> None:
    """Let all that `fully_shard` has made groups of in a model be sent so."""
    for module in model.modules():
        # Older versions of PyTorch always send their own way.
        if isinstance(module, FSDPModule) and hasattr(module, "set_custom_all_gather"):
            module.set_custom_all_gather(GatherInPlace())
            module.set_custom_reduce_scatter(ReduceInPlace())


class InPlace:
    """How FSDP2 makes what is sent, in ordinary memory."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An empty tensor [*size]."""
        return torch.empty(*size, dtype=dtype, device=device)


class GatherInPlace(InPlace):
    """The parts of all processes, one after the other, for all."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> dist.Work:
        """From a part [n], which lies in the output already, to [processes · n].

        Nothing is left to wait for in what is returned; after None FSDP2 would keep this output
        until it has read the next one.
        """
        return for_each_part(dist.broadcast, output_tensor, group, "group_src")


class ReduceInPlace(InPlace):
    """The sums over the processes, or their means, of which each process has its part."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """From [processes · n], which it may change, to the part [n]."""
        for_each_part(dist.reduce, input_tensor, group, "group_dst")
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])
        if op == dist.ReduceOp.AVG:
            output_tensor /= group.size()


def for_each_part(
    collective: Callable[..., Any], tensor: Tensor, group: Any, role: str
) -> dist.Work:
    """Do the same with each process's part of a tensor [processes · n], all at once.

    role: of the process that a part belongs to, as the collective calls it.
    """
    parts = enumerate(tensor.chunk(group.size()))
    works = [collective(part, group=group, async_op=True, **{role: rank}) for rank, part in parts]
    for work in works:
        work.wait()
    return works[-1]
