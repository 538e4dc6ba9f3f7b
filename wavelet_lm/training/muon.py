"""Muon with the matrices of one shape as one stack: the same steps in far fewer products."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wavelet_lm.kernels.adagrad import decay_
from wavelet_lm.training.weights import Weights

# Keller Jordan's iteration (https://kellerjordan.github.io/posts/muon/): five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7
MOMENTUM = 0.95
# Bytes that a step takes for a number of a stack, by the dtype of its products (`step_dtype`).
STACK_BYTES = {torch.bfloat16: 12, torch.float32: 20}
# Of a stack; products of larger matrices gain nothing from being batched, and take memory.
STACK_VALUES = 2**24


class Muon(Optimizer):
    """torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, its state included.

    Args:
        params: matrices [rows, columns] of float32, or groups of them.
        whole: what knows the whole matrices, where the params are shares of them; None = they are.

    Attributes:
        grad_scale, found_inf: as Adagrad's (`adagrad.py`).
    """

    def __init__(
        self, params: Any, *, lr: float, weight_decay: float, whole: Weights | None = None
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._whole = whole
        self._step_supports_amp_scaling = True  # PyTorch's own name for it
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all matrices that have a gradient, in place."""
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for weights in stacks(with_gradient, self._shape):
                self._step(weights, group["lr"], group["weight_decay"])

    def _step(self, weights: list[Tensor], lr: float, weight_decay: float) -> None:
        """Of up to a stack of weights of one shape."""
        skip = self.found_inf
        momenta = [self._momentum(p) for p in weights]
        gradients = torch.stack([p.grad for p in weights])
        if self.grad_scale is not None:
            gradients /= self.grad_scale
        if skip is not None:  # a momentum that meets itself stays what it is
            gradients = torch.where(skip == 0, gradients, torch.stack(momenta))
        torch._foreach_lerp_(momenta, list(gradients.unbind()), 1 - MOMENTUM)
        gradients.lerp_(torch.stack(momenta), MOMENTUM)
        if self._whole is None:
            update = orthogonal(gradients)
        else:
            update = self._whole.on_whole(weights[0], gradients, orthogonal)
        update = update.to(gradients.dtype)
        if skip is not None:
            update *= skip == 0
        decay_(weights, lr * weight_decay, skip)
        # As large as an update of AdamW, so that one learning rate serves both.
        rate = lr * 0.2 * max(self._shape(weights[0])) ** 0.5
        torch._foreach_add_(weights, list(update.unbind()), alpha=-rate)

    def _shape(self, weight: Tensor) -> torch.Size:
        """Of the whole matrix."""
        return weight.shape if self._whole is None else self._whole.whole_shape(weight)

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def stacks(
    weights: list[Tensor], shape_of: Callable[[Tensor], torch.Size] = lambda p: p.shape
) -> Iterator[list[Tensor]]:
    """The weights by their shape, up to `STACK_VALUES` numbers at a time, or one matrix."""
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for p in weights:
        by_shape[shape_of(p)].append(p)
    for shape, same in by_shape.items():
        n = max(1, STACK_VALUES // max(1, shape.numel()))
        for start in range(0, len(same), n):
            yield same[start : start + n]


def orthogonal(matrices: Tensor) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ: [n, rows, columns] in, the same shape out, in `step_dtype`
    (float64 for float64 input).

    Newton and Schulz's iteration takes the singular values to between 0.5 and 1.5, which is near
    enough.
    """
    a, b, c = COEFFICIENTS
    is_wide = matrices.dtype == torch.float64
    x = matrices if is_wide else matrices.to(step_dtype(matrices.device.type))
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    norms = torch.stack(torch._foreach_norm(list(x.unbind())))
    x = x / norms.clamp(min=SMALLEST_NORM)[:, None, None]
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        change = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, change, x, beta=a)
    return x.mT if is_tall else x


@cache
def step_dtype(device_type: str) -> torch.dtype:
    """Of the products of a step: bfloat16, or float32 on a CPU without instructions for it.

    There PyTorch multiplies bfloat16 number by number, more than ten times as slowly as float32.
    """
    if device_type != "cpu" or _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    # PyTorch's own question, of which it has no public form.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
