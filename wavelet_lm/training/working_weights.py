"""The weights as products read them: copies in half precision beside the float32 that is trained.

Under autocast every product casts its weight, again in the backward pass, and its gradient back.
Here the optimizer's step leaves a copy in half precision, the model computes with it, and its
gradient stays as the product made it. What is computed is the same: a copy is the cast weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wavelet_lm.config import TrainingConfig
from wavelet_lm.roles import uses
from wavelet_lm.transforms.joined import Joint, laid_out

Copies = dict[nn.Parameter, nn.Parameter]
HALF = (torch.bfloat16, torch.float16)


class WorkingWeights:
    """Copies of the weights that products read, which take their place while a step computes.

    Outside of `in_place` a model has its own weights: they are what is trained, saved and judged,
    and what a copy is made of. Where a weight is read by something else as well, as a tied
    embedding, each place has what it needs.

    Args:
        model: on its device, with weights of float32.
        dtype: that of the products; for float32 there are no copies.

    Attributes:
        copies: of each weight that has one, in its shape.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self._places = places(model) if dtype in HALF else {}
        weights = dict.fromkeys(self._places.values())
        together = {}
        for joint in joints(model):
            if weights.keys() >= set(joint.parts):
                together |= zip(joint.parts, laid_out(joint, dtype), strict=True)
        self.copies: Copies = {
            p: together[p] if p in together else nn.Parameter(p.detach().to(dtype)) for p in weights
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the copies again: the weights were changed by something else than a step."""
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with the copies, forward and backward."""
        self._put(self.copies)
        try:
            yield
        finally:
            self._put({p: p for p in self.copies})

    def _put(self, instead: Copies) -> None:
        for (module, key), p in self._places.items():
            module._parameters[key] = instead[p]

    @torch.no_grad()
    def gather(self, *, in_float32: bool) -> None:
        """After a backward pass: one gradient for each weight.

        It stays that of the copy, where `gradient` finds it; with `in_float32`, and where the
        weight has one itself, it is added to the weight's own.
        """
        for p, copy in self.copies.items():
            if copy.grad is None or not (in_float32 or p.grad is not None):
                continue
            if p.grad is None:
                p.grad = copy.grad.to(p.dtype)
            else:
                p.grad += copy.grad
            copy.grad = None


def copied_dtype(config: TrainingConfig, dtype: torch.dtype, n_processes: int = 1) -> torch.dtype:
    """That of the copies in a run whose products are in `dtype`; float32 means no copies.

    Weights are cast in every pass, under autocast, where several processes exchange their
    gradients, where each steps by itself, and where products in float8 take them in float32.
    """
    apart = config.optimizer_in_backward or config.optimizer_offload or config.amp_dtype == "fp8"
    return torch.float32 if apart or n_processes > 1 else dtype


def places(model: nn.Module) -> dict[tuple[nn.Module, str], nn.Parameter]:
    """Where products read the weights that are trained: module and key of each of them."""
    return {
        (use.module, use.name.rpartition(".")[2]): use.parameter
        for use in uses(model)
        if use.parameter is not None and use.role.in_products and use.parameter.requires_grad
    }


def joints(model: nn.Module) -> Iterator[Joint]:
    """What products read together."""
    for module in model.modules():
        if hasattr(module, "joints"):
            yield from module.joints()


def gradient(p: nn.Parameter, copies: Copies) -> Tensor | None:
    """Of a weight, in its shape: its own, or that of its copy in half precision."""
    return copies[p].grad if p.grad is None and p in copies else p.grad


def with_gradients(
    weights: Iterable[nn.Parameter], copies: Copies
) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The weights, of any shapes, that have a `gradient`, and these, each in its weight's shape."""
    found = [(p, g) for p in weights if (g := gradient(p, copies)) is not None]
    return [p for p, _ in found], [g for _, g in found]
