"""Optimizers by name, and their state as named tensors for the checkpoint."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm import roles
from wavelet_lm.config import TrainingConfig
from wavelet_lm.errors import missing_extra
from wavelet_lm.kernels.adagrad import decay_
from wavelet_lm.training.adagrad import Adagrad
from wavelet_lm.training.adamw import AdamW
from wavelet_lm.training.muon import STACK_BYTES, Muon, stacks, step_dtype
from wavelet_lm.training.offload import brought, kept, refuse_offload_to_itself
from wavelet_lm.training.weights import Weights
from wavelet_lm.training.working_weights import Copies, gradient

# Numbers that an optimizer keeps for each weight; Muon keeps one for a matrix.
STATE_NUMBERS = {"Adagrad": 1, "AdamW": 2, "Muon": 2, "Adagrad8bit": 1, "AdamW8bit": 2}
# bitsandbytes keeps a byte and, for each block of them, a float32; of small tensors float32.
BLOCK_OF_8_BITS, SMALLEST_IN_8_BITS = 256, 4096


class Optimizer:
    """One optimizer, or Muon for the matrices beside AdamW for the rest, behind one interface.

    With `optimizer_in_backward` each weight steps when backward has its gradient, and `step` has
    nothing left to do; with `optimizer_offload` one weight after the other steps, and only its own
    state is on the device.

    Raises:
        UserError: the state is to be offloaded to where it is, or bitsandbytes is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        weights: Weights | None = None,
        copies: Copies | None = None,
    ):
        """What a model is trained with.

        Args:
            weights: what to step on, by the names of the model's; None = the model's own.
            copies: as `WorkingWeights.copies`; a step reads their gradients and writes them too.
        """
        self.copies = copies or {}
        named = {n: p for n, p in (weights or model).named_parameters() if p.requires_grad}
        maps = roles.maps(model)
        names = {n for n, p in model.named_parameters() if p in maps}
        matrices = {n: p for n, p in named.items() if n in names}
        others = {n: p for n, p in named.items() if n not in matrices}
        self.parts: list[torch.optim.Optimizer]
        match config.optimizer:
            case "Adagrad":
                groups = _groups(config, named, {})
                options = {"lr": config.lr, "eps": config.optimizer_eps}
                self.parts = [Adagrad(groups, **options, copies=self.copies)]
            case "Adagrad8bit":
                self.parts = [_bitsandbytes(config, _groups(config, named, {}))]
            case "AdamW":
                self.parts = [self._adamw(config, _groups(config, matrices, others))]
            case "AdamW8bit":
                self.parts = [_bitsandbytes(config, _groups(config, matrices, others))]
            case "Muon":
                self.parts = [
                    Muon(
                        list(matrices.items()),
                        lr=config.lr,
                        weight_decay=config.weight_decay,
                        whole=weights,
                    ),
                    self._adamw(config, _groups(config, {}, others)),
                ]
        self.names = {p: n for n, p in named.items()}
        self._homes = {
            p: (part, i)
            for part in self.parts
            for i, group in enumerate(part.param_groups)
            for p in group["params"]
        }
        self._offloads, self._in_backward = config.optimizer_offload, config.optimizer_in_backward
        if self._offloads:
            refuse_offload_to_itself(self._device)
        if self._in_backward:
            for p in self.names:
                p.register_post_accumulate_grad_hook(self._step_and_free)

    def _adamw(self, config: TrainingConfig, groups: list[dict[str, Any]]) -> AdamW:
        options = {"lr": config.lr, "betas": config.adam_betas, "eps": config.optimizer_eps}
        return AdamW(groups, **options, copies=self.copies)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next steps."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        for copy in self.copies.values():
            copy.grad = None

    def gradients(self) -> list[Tensor]:
        """Of every weight that has one, in its shape; in half precision where that of a copy is."""
        found = [gradient(p, self.copies) for p in self.names]
        return [g for g in found if g is not None]

    @torch.no_grad()
    def step(self, divisor: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Update the weights from their gradients.

        Args:
            divisor: 0-d float32, what all gradients are divided by first; None = 1.
            skip: 0-d float32, 1 where this step is to be left out, else 0; None = never.
        """
        if self._in_backward:
            return
        if self._offloads:
            for p in self.names:
                if p.grad is not None:
                    self._step_alone(p, divisor, skip)
            return
        for part in self.parts:
            self._step_part(part, divisor, skip)

    def _step_part(
        self, part: torch.optim.Optimizer, divisor: Tensor | None, skip: Tensor | None
    ) -> None:
        copied = [] if getattr(part, "writes_copies", False) else self._widened(part)
        if getattr(part, "_step_supports_amp_scaling", False):
            # In the pass of the step itself, and on the device: nothing is waited for.
            part.grad_scale, part.found_inf = divisor, skip
            part.step()
            part.grad_scale = part.found_inf = None
        else:
            self._step_apart(part, divisor, skip)
        if copied:
            torch._foreach_copy_([self.copies[p] for p in copied], copied)

    def _widened(self, part: torch.optim.Optimizer) -> list[nn.Parameter]:
        """The weights of an optimizer that have copies; their gradients are float32 after it."""
        copied = [p for group in part.param_groups for p in group["params"] if p in self.copies]
        halves = [p for p in copied if p.grad is None and self.copies[p].grad is not None]
        for p in halves:
            p.grad = torch.empty_like(p)
        if halves:
            grads = [self.copies[p].grad for p in halves]
            torch._foreach_copy_([p.grad for p in halves], grads)
        return copied

    def _step_alone(self, p: nn.Parameter, divisor: Tensor | None, skip: Tensor | None) -> None:
        part, number = self._homes[p]
        there = brought(part.state[p], self._device) if self._offloads else nullcontext()
        with there, _only(part, number, p):
            self._step_part(part, divisor, skip)

    @torch.no_grad()
    def _step_and_free(self, p: nn.Parameter) -> None:
        self._step_alone(p, None, None)
        p.grad = None

    @property
    def _device(self) -> torch.device:
        return next(iter(self.names)).device

    def _step_apart(
        self, part: torch.optim.Optimizer, divisor: Tensor | None, skip: Tensor | None
    ) -> None:
        """The same in passes of their own, for an optimizer that knows none of it."""
        if skip is not None and bool(skip):
            return
        for group in part.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if divisor is not None and weights:
                torch._foreach_div_([p.grad for p in weights], divisor)
            if weights and group.get("decoupled_decay"):
                decay_(weights, group["lr"] * group["decoupled_decay"])
        part.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors by name, and JSON-ready scalars."""
        if self._offloads and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the last copies to the CPU may be on their way
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for i, part in enumerate(self.parts):
            for parameter, entries in part.state.items():
                for key, value in entries.items():
                    target = tensors if isinstance(value, Tensor) else scalars
                    target[f"{i}/{self.names[parameter]}/{key}"] = value
        return tensors, scalars

    def load_state(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for i, part in enumerate(self.parts):
            # torch numbers the parameters of an optimizer in the order of its groups.
            parameters = [p for group in part.param_groups for p in group["params"]]
            numbers = {self.names[p]: number for number, p in enumerate(parameters)}
            state: dict[int, dict[str, Any]] = {}
            for path, value in [*tensors.items(), *scalars.items()]:
                index, name, key = path.split("/")
                if int(index) == i:
                    state.setdefault(numbers[name], {})[key] = value
            if self._offloads:  # PyTorch would bring all of it to the device
                for number, entries in state.items():
                    p = parameters[number]
                    part.state[p] = {key: kept(v, p.device) for key, v in entries.items()}
                continue
            part.load_state_dict(
                {"state": state, "param_groups": part.state_dict()["param_groups"]}
            )


def state_bytes(model: nn.Module) -> dict[nn.Parameter, int]:
    """Bytes of the optimizer's state of each weight that is trained."""
    name, maps = model.config.optimizer, roles.maps(model)

    def of(p: nn.Parameter) -> int:
        numbers = 1 if name == "Muon" and p in maps else STATE_NUMBERS[name]
        in_8_bits = name.endswith("8bit") and p.numel() >= SMALLEST_IN_8_BITS
        return int(p.numel() * numbers * (1 + 4 / BLOCK_OF_8_BITS if in_8_bits else 4))

    return {p: of(p) for p in model.parameters() if p.requires_grad}


def step_bytes(model: nn.Module, device_type: str) -> dict[nn.Parameter, int]:
    """Bytes that the step takes, and gives back, while each of the weights steps.

    Of Muon those of a stack, of a state in the CPU's memory the state that is brought.

    Args:
        device_type: where it steps, `cpu` or `cuda`.
    """
    config, states = model.config, state_bytes(model)
    taken = {p: n * config.optimizer_offload for p, n in states.items()}
    if config.optimizer == "Muon":
        matrices = [p for p in states if p in roles.maps(model)]
        alone = config.optimizer_offload or config.optimizer_in_backward
        for stack in [[p] for p in matrices] if alone else stacks(matrices):
            size = STACK_BYTES[step_dtype(device_type)] * sum(p.numel() for p in stack)
            for p in stack:
                taken[p] += size
    return taken


def widened_gradients(model: nn.Module, halves: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Of weights with a gradient in half precision, those that step on one in float32 made of it.

    As on a GPU, where the passes of Adagrad and AdamW read the halves themselves.
    """
    match model.config.optimizer:
        case "Adagrad" | "AdamW":
            return []
        case "Muon":
            matrices = roles.maps(model)
            return [p for p in halves if p in matrices]
    return list(halves)


@contextmanager
def _only(part: torch.optim.Optimizer, number: int, p: nn.Parameter) -> Iterator[None]:
    """Inside, an optimizer has one weight, of the group of that number."""
    groups = part.param_groups
    before = [group["params"] for group in groups]
    for i, group in enumerate(groups):
        group["params"] = [p] if i == number else []
    try:
        yield
    finally:
        for group, params in zip(groups, before, strict=True):
            group["params"] = params


def _groups(config: TrainingConfig, decayed: dict, others: dict) -> list[dict[str, Any]]:
    apart = config.weight_decay_mode == "decoupled"  # of an optimizer that would couple it
    groups = [
        {
            "params": list(decayed.items()),
            "weight_decay": 0.0 if apart else config.weight_decay,
            "decoupled_decay": config.weight_decay if apart else 0.0,
        },
        {"params": list(others.items()), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _bitsandbytes(config: TrainingConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except ImportError:
        raise missing_extra(f"optimizer {config.optimizer}", "bitsandbytes", "cuda") from None
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    options: dict[str, Any] = {"lr": config.lr, "eps": config.optimizer_eps}
    if config.optimizer == "AdamW8bit":
        options["betas"] = config.adam_betas
    return getattr(bitsandbytes.optim, config.optimizer)(groups, **options)
