"""One rank of many, rehearsed: FSDP among processes that are not there.

PyTorch's fake process group answers every collective at once with nothing; the weights, gathered
and shared out, are fake tensors. So shapes, memory and what is sent are those of N devices.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from wavelet_lm.config import Config
from wavelet_lm.models.registry import build_model
from wavelet_lm.training.parallelize import share_out
from wavelet_lm.training.rehearsal import Rehearsal, counted, fake_mode

CPU = torch.device("cpu")


@contextlib.contextmanager
def fake_ranks(n: int) -> Iterator[DeviceMesh]:
    """The first of n ranks, in a process that belongs to no group."""
    dist.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (n,))
    finally:
        dist.destroy_process_group()


def rehearse_fsdp(
    config: Config, vocab_size: int, n: int, device_type: str, dtype: torch.dtype
) -> Rehearsal:
    """A step of one of n ranks that share a model.

    Args:
        config: with the rank's own micro-batches and passes.
        device_type, dtype: as for `rehearse`.
    """
    with fake_ranks(n) as mesh, fake_mode(), torch.random.fork_rng([]):
        with CPU:
            model = build_model(config, vocab_size)
        share_out(model, config, mesh, CPU)
        return counted(model, CPU, device_type, dtype)
