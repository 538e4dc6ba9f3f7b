"""Several processes for one model, from outside: DDP or FSDP2 around it, and no block knows of it.

DDP keeps the whole model in every process and averages the gradients. FSDP2 (Zhao et al., 2023,
"PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", and PyTorch's `fully_shard`)
keeps a share of every weight, of its gradient and of its optimizer state: the weights of a block
are gathered for its forward and its backward pass and given back, and their gradients come as sums
of which each process keeps its share.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from wavelet_lm import devices
from wavelet_lm.config import Config
from wavelet_lm.models.checkpoint import EXTRA, Checkpoint
from wavelet_lm.models.gpt.attention import Attention
from wavelet_lm.models.gpt.model import GPTMLP
from wavelet_lm.models.wavelet_lm.delta_memory import DeltaMemory
from wavelet_lm.models.wavelet_lm.memory import ValueTable
from wavelet_lm.models.wavelet_lm.mixer import SpectralMixer
from wavelet_lm.models.wavelet_lm.mlp import MLP
from wavelet_lm.training.gloo import send_in_place
from wavelet_lm.training.processes import Processes
from wavelet_lm.training.weights import Saved, Weights

LossFunction = Callable[..., tuple[Tensor, Any]]

# What is called of a model and of a wavelet besides `forward`, and reads their own weights.
MODEL_METHODS = ("loss", "token_losses")
WAVELET_METHODS = ("decompose", "reconstruct")


def parallelize(
    model: nn.Module, loss: LossFunction, device: torch.device, n_passes: int
) -> LossFunction:
    """The loss whose backward pass leaves the mean gradient of all processes.

    Args:
        model: whole, or sharded by `sharded_model`.
        loss: `model.loss`, or what computes the same.
        n_passes: calls for one step of the optimizer; between them gradients add up.
    """
    if is_sharded(model):
        return loss  # its gradients are reduced in every pass: whole ones would not fit
    ids = None if device.type == "cpu" else [device.index]
    with warnings.catch_warnings():  # of a newer name for one of these, with another meaning
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = DistributedDataParallel(
            _Loss(model, loss),
            device_ids=ids,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    calls = itertools.count(1)

    def mean_loss(*args: Any) -> tuple[Tensor, Any]:
        # What `no_sync` is for; the forward pass decides.
        wrapped.require_backward_grad_sync = next(calls) % n_passes == 0
        return wrapped(*args)

    return mean_loss


class _Loss(nn.Module):
    """A model whose forward is its loss, as DDP needs it."""

    def __init__(self, model: nn.Module, loss: LossFunction):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args: Any) -> tuple[Tensor, Any]:
        return self.loss(*args)


def parts(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights are gathered together, inner ones first and the model last.

    The large parts of a block and then what is left of it, a wavelet (which blocks may share), and
    an embedding whose table is not the head's too; the model's own group has the rest: norms and
    head.
    """
    found: list[nn.Module] = []
    for network in model.networks():
        tied = network.head.weight is network.embedding.weight
        found += [part for block in network.blocks for part in large_parts(block)]
        found += [*getattr(network, "wavelets", ()), *network.blocks]
        found += [] if tied else [network.embedding]
    return [part for part in found if next(part.parameters(), None) is not None] + [model]


def large_parts(block: nn.Module) -> Iterator[nn.Module]:
    """Those of a block that are called as modules, and of which nothing else reads the weights."""
    for module in block.modules():
        if isinstance(module, MLP | GPTMLP):
            yield from (part for part in module.modules() if isinstance(part, nn.Linear))
        elif isinstance(module, Attention | DeltaMemory | SpectralMixer | ValueTable):
            yield module


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are shares of FSDP."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def sharded_model(
    build: Callable[[], nn.Module], config: Config, device: torch.device, processes: Processes
) -> nn.Module:
    """The model that `build` makes, each process with its share of it.

    Only the first process makes the weights, in the CPU's memory; they are handed out one by one.

    Args:
        build: makes the model on the default device.
    """
    whole = None
    if processes.is_main:
        with torch.device("cpu"):
            whole = build()
    with torch.device("meta"), torch.random.fork_rng([]):
        model = build()
    mesh = init_device_mesh(device.type, (processes.size,))
    # A CPU's norms take no weights of another type than their inputs.
    gathered = config.replace(use_amp=False) if device.type == "cpu" else config
    share_out(model, gathered, mesh, device)
    if device.type == "cpu":
        send_in_place(model)
    model.to_empty(device="cpu" if config.fsdp_cpu_offload else device)
    for module in model.modules():  # buffers are whole, and beside the computation
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    made = dict(_named_tensors(whole)) if whole is not None else {}
    with torch.no_grad():
        for name, tensor in _named_tensors(model):
            full = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if processes.is_main:
                full.copy_(made.pop(name))
            dist.broadcast(full, 0)
            fill(tensor, full)
    return model


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def fill(target: Tensor, full: Tensor) -> None:
    """Copy a whole tensor, or where the target is a share of one its part, of one shape in all."""
    if isinstance(target, DTensor):
        share = distribute_tensor(
            full.to(target.dtype), target.device_mesh, target.placements, src_data_rank=None
        )
        target, full = target.to_local(), share.to_local()
    target.copy_(full)


def share_out(model: nn.Module, config: Config, mesh: DeviceMesh, device: torch.device) -> None:
    """Let each process of a mesh hold its share of a model's weights, as the config asks."""
    # Nothing changes in place what a block or a wavelet returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    dtype = devices.amp_dtype(config, device)
    whole = mixed = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype != torch.float32:
        # What autocast would make of a block's matrices anyway is sent so, too.
        mixed = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    # A single number cannot be shared out.
    kept = {p for p in model.parameters() if p.dim() == 0}
    wavelets = {w for network in model.networks() for w in getattr(network, "wavelets", ())}
    shared = {w for network in model.networks() for w in shared_wavelets(network)}
    outside = {model, *(network.embedding for network in model.networks())}
    for part in parts(model):
        fully_shard(
            part,
            mesh=mesh,
            # The backward pass begins with the head, and the next block reads a shared wavelet.
            reshard_after_forward=config.fsdp_reshard and part not in (model, *shared),
            mp_policy=whole if part in outside else mixed,
            offload_policy=CPUOffloadPolicy() if config.fsdp_cpu_offload else OffloadPolicy(),
            ignored_params=kept,
        )
    for part, methods in [(model, MODEL_METHODS), *((w, WAVELET_METHODS) for w in wavelets)]:
        for name in methods:
            if is_sharded(part):
                register_fsdp_forward_method(part, name)


def shared_wavelets(network: nn.Module) -> list[nn.Module]:
    """The wavelets of a network that several blocks read."""
    wavelets = list(getattr(network, "wavelets", ()))
    return wavelets if len(wavelets) < len(network.order if wavelets else ()) else []


class ShardedWeights(Weights):
    """The shares of this process, as plain parameters for the optimizer.

    A single number, which cannot be shared out, is whole in every process.
    """

    are_whole = False

    def __init__(self, model: nn.Module, processes: Processes):
        super().__init__(model)
        self._processes = processes
        # A group that is gathered has other parameters for a while.
        self._parameters = dict(model.named_parameters())
        self._sharded = {n: p for n, p in self._parameters.items() if isinstance(p, DTensor)}
        self._own = {name: _own(p) for name, p in self._parameters.items()}
        self._whole_shapes = {self._own[name]: p.shape for name, p in self._sharded.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._own.items())

    @torch.no_grad()
    def take_gradients(self) -> None:
        for name, p in self._sharded.items():
            own = self._own[name]
            own.data = p.to_local()  # which FSDP may have put elsewhere
            own.grad = None if p.grad is None else p.grad.to_local()
            p.grad = None
        numbers = [p.grad for p in self._numbers() if p.grad is not None]
        if numbers:
            mean = self._processes.total(torch.stack(numbers)) / self._processes.size
            torch._foreach_copy_(numbers, list(mean.unbind()))

    def _numbers(self) -> Iterator[nn.Parameter]:
        return (p for name, p in self._own.items() if name not in self._sharded)

    def norm(self, gradients: Iterable[Tensor]) -> Tensor:
        shares = [self._own[name].grad for name in self._sharded]
        squares = self._processes.total(self._squares(shares))
        return (squares + self._squares([p.grad for p in self._numbers()])).sqrt()

    def _squares(self, gradients: list[Tensor | None]) -> Tensor:
        there = [g for g in gradients if g is not None and g.numel()]
        if not there:
            return torch.zeros((), device=next(iter(self._own.values())).device)
        return nn.utils.get_total_norm(there).square()

    def whole_shape(self, p: Tensor) -> torch.Size:
        return self._whole_shapes.get(p, p.shape)

    def on_whole(self, p: Tensor, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        rows = self.whole_shape(p)[0]
        most = -(-rows // self._processes.size)
        own = slice(most * self._processes.rank, most * self._processes.rank + values.shape[1])
        padded = nn.functional.pad(values, (0, 0, 0, most - values.shape[1]))
        whole = self._processes.joined(padded.transpose(0, 1))  # [size · most, n, columns]
        return function(whole.transpose(0, 1)[:, :rows].contiguous())[:, own]

    @torch.no_grad()
    def are_finite(self) -> bool:
        bad = torch.stack([(~p.isfinite()).any() for p in self.parameters()]).any()
        return not bool(self._processes.total(bad.float()))

    def shares(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._parameters.items()}

    @torch.no_grad()
    def gathered(self) -> dict[str, Tensor]:
        """One weight at a time is whole in every process; on the first one's CPU all are."""
        whole: dict[str, Tensor] = {}
        for name, p in self.shares().items():
            full = p.full_tensor() if isinstance(p, DTensor) else p
            if self._processes.is_main:
                whole[name] = full.to("cpu", copy=True)
        return whole

    @torch.no_grad()
    def whole(self, names: Iterable[str]) -> dict[str, Tensor]:
        shares = super().whole(names).items()
        return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in shares}

    @torch.no_grad()
    def load(self, checkpoint: Saved) -> None:
        if not isinstance(checkpoint, Checkpoint):  # shares of some number of processes
            checkpoint.load_into(self.model)
            return
        checkpoint.check_fits(self.model)
        for name, p in self.shares().items():
            fill(p, checkpoint.tensor(name))

    def extra(self, checkpoint: Saved) -> dict[str, Tensor]:
        if not isinstance(checkpoint, Checkpoint):
            read = checkpoint.extra(self._target)
        else:
            read = {name: self._shared_out(name, t) for name, t in checkpoint.extra().items()}
        return {n: t.to_local() if isinstance(t, DTensor) else t for n, t in read.items()}

    def _shared_out(self, name: str, full: Tensor) -> Tensor:
        target = self._target(name, full.shape, full.dtype)
        fill(target, full)
        return target

    def _target(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An empty tensor to read a saved one into: a share, where it is of a shared weight."""
        p = self._sharded.get(parameter_of(name))
        if p is None or p.shape != shape:
            return torch.empty(shape, dtype=dtype)
        return _global(torch.empty_like(p.to_local(), dtype=dtype), p)

    def global_state(self, name: str, state: Tensor) -> Tensor:
        p = self._sharded.get(parameter_of(name))
        if p is None or state.dim() == 0 or state.shape != p.to_local().shape:
            return state
        return _global(state, p)


def weights_of(model: nn.Module, processes: Processes) -> Weights:
    """What this process steps on, of a model that is whole or sharded."""
    return ShardedWeights(model, processes) if is_sharded(model) else Weights(model)


def parameter_of(name: str) -> str:
    """The parameter that a saved tensor of the optimizer is of: `optimizer/<part>/<name>/<key>`."""
    words = name.removeprefix(EXTRA).split("/")
    return words[2] if words[0] == "optimizer" and len(words) == 4 else ""


def _own(p: nn.Parameter) -> nn.Parameter:
    if not isinstance(p, DTensor):
        return p
    return nn.Parameter(p.detach().to_local(), requires_grad=p.requires_grad)


def _global(share: Tensor, like: DTensor) -> DTensor:
    """A share of this process as a part of a tensor that is shared out as `like` is."""
    return DTensor.from_local(
        share,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
