"""A training step without its numbers: what it would hold in memory, multiply and move.

The step is run on PyTorch's fake tensors, which have shapes, dtypes and a device and no memory: of
any model in seconds, on any machine. Every tensor that it makes is counted for as long as it lives,
so whatever changes a step (checkpointed blocks, weights that step in backward, number formats)
changes the figures without a word about it here.
"""

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wavelet_lm import devices
from wavelet_lm.config import Config
from wavelet_lm.models import losses
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.registry import build_model
from wavelet_lm.training.optimizers import state_bytes, step_bytes

WEIGHTS, GRADIENTS, STATE, ACTIVATIONS = "weights", "gradients", "optimizer state", "activations"
aten = torch.ops.aten
# In place, the same products.
FORMULAS = {**flop_registry, aten.addmm_: flop_registry[aten.addmm]}


@dataclass(frozen=True)
class Operation:
    """One operation of a step: FLOPs of a product, bytes read and written; `fp8` its factors."""

    flops: int
    n_bytes: int
    fp8: bool = False


@dataclass
class Rehearsal:
    """What a step of one process takes, in bytes.

    held: by kind, when most is held; the optimizer's state is that of later steps, and on the
    device; on_host: its state in the CPU's memory; operations: of one forward and backward pass, of
    which a step has n_passes.
    """

    held: dict[str, int]
    on_host: int = 0
    operations: list[Operation] = field(default_factory=list)
    n_passes: int = 1

    @property
    def peak(self) -> int:
        """All that is held on the device at one time."""
        return sum(self.held.values())

    @property
    def flops(self) -> int:
        """Of the products of a step, blocks that run again in backward included."""
        return self.n_passes * sum(operation.flops for operation in self.operations)


@lru_cache(maxsize=4)
def rehearse(config: Config, vocab_size: int, device_type: str, dtype: torch.dtype) -> Rehearsal:
    """Run a step of a config, on tensors that are not there.

    Args:
        device_type: `cpu` or `cuda`, whose sizes of the loss's chunks are taken.
        dtype: of autocast; float32 = none.
    """
    chunks = losses.GRADIENT_CHUNK_ELEMENTS[device_type]
    # Meta tensors are quicker, but nothing takes them for those of a CPU: no autocast, no kernel.
    on_meta = dtype == torch.float32 and not config.delta_memory
    device = torch.device("meta" if on_meta else "cpu")
    with (
        nullcontext() if on_meta else _fake_mode(),
        mock.patch.dict(losses.GRADIENT_CHUNK_ELEMENTS, {device.type: chunks}),
        torch.random.fork_rng([]),
    ):
        with device:
            model = build_model(config, vocab_size)
        with StepCounter(model) as counter:
            for _ in range(min(2, config.grad_accum)):  # all but the first find gradients there
                counter.operations = []
                run_step(model, device, dtype)
        return counter.result()


def _fake_mode() -> AbstractContextManager:
    from torch._subclasses.fake_tensor import FakeTensorMode  # a second of imports

    return FakeTensorMode()


def run_step(model: LanguageModel, device: torch.device, dtype: torch.dtype) -> None:
    """Forward and backward of one micro-batch."""
    B, T = model.config.micro_batch_size, model.config.block_size
    tokens = torch.zeros(B, T, dtype=torch.int64, device=device)
    with devices.autocast(device, dtype):
        loss, _ = model.loss(tokens, tokens, model.first_window(B, device))
    loss.backward()


class StepCounter(TorchDispatchMode):
    """Counts the storages of a model's training step while it is on."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config
        self.now = dict.fromkeys((WEIGHTS, GRADIENTS, STATE, ACTIVATIONS), 0)
        self.most, self.most_held = 0, dict(self.now)
        self.operations: list[Operation] = []
        self._kinds: dict[int, list[Any]] = {}  # a storage's kind and size, by its address
        for tensor in [*model.parameters(), *model.buffers()]:
            self._hold(tensor, WEIGHTS)
        self.state, self.step = sum(state_bytes(model).values()), step_bytes(model)
        self.now[STATE] = 0 if self.config.optimizer_offload else self.state
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._accumulated)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in made:
            self._hold(tensor, ACTIVATIONS)
        if not function.is_view:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            formula = FORMULAS.get(function._overloadpacket)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
            n_bytes = sum(t.numel() * t.element_size() for t in [*read, *made])
            fp8 = any(t.dtype.itemsize == 1 and t.is_floating_point() for t in read)
            self.operations.append(Operation(flops, n_bytes, fp8))
        return result

    def _hold(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._kinds:
            return
        self._kinds[storage._cdata] = [kind, storage.nbytes()]
        self.now[kind] += storage.nbytes()
        weakref.finalize(storage, self._freed, storage._cdata)
        self._note()

    def _freed(self, address: int) -> None:
        kind, n_bytes = self._kinds.pop(address)
        self.now[kind] -= n_bytes

    def _note(self, beside: int = 0) -> None:
        """Remember what is held if it is the most, with bytes of activations beside it."""
        total = sum(self.now.values()) + beside
        if total > self.most:
            self.most, self.most_held = total, {**self.now}
            self.most_held[ACTIVATIONS] += beside

    def _accumulated(self, p: nn.Parameter) -> None:
        entry = self._kinds[p.grad.untyped_storage()._cdata]
        self.now[entry[0]] -= entry[1]
        entry[0] = GRADIENTS
        self.now[GRADIENTS] += entry[1]
        if self.config.optimizer_in_backward:
            self._note(self.step[p])
            p.grad = None

    def result(self) -> Rehearsal:
        """After the backward passes; the optimizer's step is still to come."""
        if not self.config.optimizer_in_backward:
            self._note(max(self.step.values()))
        host = self.state if self.config.optimizer_offload else 0
        return Rehearsal(self.most_held, host, self.operations, self.config.grad_accum)
