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
from wavelet_lm.training.optimizers import state_bytes, step_bytes, widened_gradients
from wavelet_lm.training.working_weights import WorkingWeights, copied_dtype

WEIGHTS, GRADIENTS, STATE, ACTIVATIONS = "weights", "gradients", "optimizer state", "activations"
GATHERED = "gathered weights"  # of others, for as long as they are read
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
    which a step has n_passes; collectives: those of one pass among several processes, each with the
    bytes of the whole tensor that it makes or takes.
    """

    held: dict[str, int]
    on_host: int = 0
    operations: list[Operation] = field(default_factory=list)
    n_passes: int = 1
    collectives: list[tuple[str, int]] = field(default_factory=list)

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
    # Meta tensors are quicker, but nothing takes them for those of a CPU: no autocast, no kernel.
    on_meta = dtype == torch.float32 and not config.delta_memory
    device = torch.device("meta" if on_meta else "cpu")
    with nullcontext() if on_meta else fake_mode(), torch.random.fork_rng([]):
        with device:
            model = build_model(config, vocab_size)
        return counted(model, device, device_type, dtype, copied_dtype(config, dtype))


def counted(
    model: LanguageModel,
    device: torch.device,
    device_type: str,
    dtype: torch.dtype,
    copied: torch.dtype = torch.float32,
) -> Rehearsal:
    """What a step of a model takes whose tensors are fake.

    Args:
        device: of those.
        device_type, dtype: as for `rehearse`.
        copied: dtype of the copies of weights that products read; float32 = none.
    """
    chunks = losses.GRADIENT_CHUNK_ELEMENTS.get(device_type, 0)
    in_blocks = {device.type} if device_type in losses.IN_BLOCKS else set()
    working = WorkingWeights(model, copied)
    with (
        mock.patch.object(losses, "IN_BLOCKS", in_blocks),
        mock.patch.dict(losses.GRADIENT_CHUNK_ELEMENTS, {device.type: chunks}),
        StepCounter(model, working, device_type) as counter,
    ):
        for _ in range(min(2, model.config.grad_accum)):  # all but the first find gradients there
            counter.operations, counter.collectives = [], []
            with working.in_place():
                run_step(model, device, dtype)
            working.gather(in_float32=model.config.grad_accum > 1)
            counter.gathered()
    return counter.result()


def fake_mode() -> AbstractContextManager:
    """Inside, tensors that are made have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # a second of imports

    return FakeTensorMode(allow_non_fake_inputs=True)


def run_step(model: LanguageModel, device: torch.device, dtype: torch.dtype) -> None:
    """Forward and backward of one micro-batch."""
    B, T = model.config.micro_batch_size, model.config.block_size
    tokens = torch.zeros(B, T, dtype=torch.int64, device=device)
    with devices.autocast(device, dtype):
        loss, _ = model.loss(tokens, tokens, model.first_window(B, device))
    loss.backward()


class StepCounter(TorchDispatchMode):
    """Counts the storages of a model's training step while it is on."""

    def __init__(self, model: LanguageModel, working: WorkingWeights, device_type: str):
        super().__init__()
        self.model, self.config, self.working = model, model.config, working
        self.now = dict.fromkeys((WEIGHTS, GATHERED, GRADIENTS, STATE, ACTIVATIONS), 0)
        self.most, self.most_held = 0, dict(self.now)
        self.operations: list[Operation] = []
        self.collectives: list[tuple[str, int]] = []
        self._kinds: dict[int, list[Any]] = {}  # a storage's kind and size, by its address
        copies = working.copies.values()
        for tensor in [*model.parameters(), *model.buffers(), *copies]:
            self._hold(own(tensor), WEIGHTS)
        # A share of a weight has that share of the state.
        shares = {p: own(p).numel() / max(1, p.numel()) for p in model.parameters()}
        self.state = int(sum(n * shares[p] for p, n in state_bytes(model).items()))
        self.step = {p: int(n * shares[p]) for p, n in step_bytes(model, device_type).items()}
        self.now[STATE] = 0 if self.config.optimizer_offload else self.state
        for p in [*model.parameters(), *copies]:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._accumulated)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented  # shares: what is done with them comes here again
        result = function(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in made:
            self._hold(tensor, ACTIVATIONS)
        if function.namespace == "c10d":
            whole = max(t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor))
            self.collectives.append((function._overloadpacket.__name__.strip("_"), whole))
        elif not function.is_view:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            formula = FORMULAS.get(function._overloadpacket)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
            n_bytes = sum(t.numel() * t.element_size() for t in [*read, *made])
            self.operations.append(Operation(flops, n_bytes, self._in_float8(function, read)))
        return result

    def _in_float8(self, function: Any, factors: list[Tensor]) -> bool:
        """Whether it is a product of a linear layer, but the head, that `fp8` would take."""
        if self.config.amp_dtype != "fp8" or function._overloadpacket not in (aten.mm, aten.addmm):
            return False
        return all(self.model.vocab_size not in factor.shape for factor in factors)

    def __enter__(self) -> "StepCounter":
        # Gathered weights are given back and come again by resizing what holds them.
        real, counter = torch.UntypedStorage.resize_, self

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = real(storage, size)
            counter._resized(storage)
            return result

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resize)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
        super().__exit__(*error)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        entry = self._kinds.get(storage._cdata)
        if entry is None:
            return
        self.now[entry[0]] -= entry[1]
        entry[:] = [GATHERED, storage.nbytes()]
        self.now[GATHERED] += entry[1]
        self._note()

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
        entry = self._kinds[own(p.grad).untyped_storage()._cdata]
        self.now[entry[0]] -= entry[1]
        entry[0] = GRADIENTS
        self.now[GRADIENTS] += entry[1]
        if self.config.optimizer_in_backward:
            self._note(self.step[p])
            p.grad = None

    def gathered(self) -> None:
        """Called when gradients of copies have been added to those of their weights."""
        for p in self.working.copies:
            if p.grad is not None:
                self._accumulated(p)

    def result(self) -> Rehearsal:
        """After the backward passes; the optimizer's step is still to come."""
        if not self.config.optimizer_in_backward:
            halves = [p for p in self.working.copies if p.grad is None]
            widened = widened_gradients(self.model, halves)
            self._note(max(self.step.values()) + 4 * sum(p.numel() for p in widened))
        host = self.state if self.config.optimizer_offload else 0
        passes = self.config.grad_accum
        return Rehearsal(self.most_held, host, self.operations, passes, self.collectives)


def own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor of any shape that several share, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
