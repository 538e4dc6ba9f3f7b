"""Adagrad with the scale of its gradients, its clipping and its decay in the step's own pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wavelet_lm.kernels.adagrad import Rates, adagrad_, decay_
from wavelet_lm.training.working_weights import Copies, with_gradients

Update = Callable[..., None]


class Adagrad(torch.optim.Adagrad):
    """PyTorch's Adagrad, its state included, with decoupled decay and one pass on CUDA too.

    On a CPU the step is PyTorch's fused one, on CUDA the Triton kernel; where there is no Triton,
    PyTorch's again, from the version on that has one for CUDA, or the kernel's plain twin.

    Args:
        groups: the decay of each is `weight_decay` (coupled) or `decoupled_decay`.
        copies: as `WorkingWeights.copies`, whose gradients it reads.

    Attributes:
        grad_scale: 0-d float32, what all gradients are divided by; None = 1.
        found_inf: 0-d float32, 1 where this step is to be left out, else 0; None = never.

    All of PyTorch's fused optimizers have both of these, under these names.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        eps: float,
        copies: Copies | None = None,
    ):
        # The sums are made when their weight first steps, not all of them here, on the device.
        super().__init__([{"params": []}], lr=lr, eps=eps, fused=True)
        self.param_groups.clear()
        for group in groups:
            self.add_param_group(group)
        self._step_supports_amp_scaling = True  # PyTorch's name for the two attributes below
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._update = _update(self.param_groups[0]["params"][0].device.type)
        self.copies = copies or {}

    @property
    def writes_copies(self) -> bool:
        """Whether a step reads gradients of copies and writes the copies too, or neither."""
        return self._update is not None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all weights that have a gradient, in place."""
        for group in self.param_groups:
            weights, gradients = with_gradients(group["params"], self.copies)
            if not weights:
                continue
            states = [self._state(p) for p in weights]
            decoupled = group.get("decoupled_decay", 0.0)
            if self._update is None:
                if decoupled:
                    decay_(weights, group["lr"] * decoupled, self.found_inf)
                continue
            rates = Rates(
                group["lr"], decoupled or group["weight_decay"], bool(decoupled), group["eps"]
            )
            sums, steps = ([state[key] for state in states] for key in ("sum", "step"))
            scalars, copies = (self.grad_scale, self.found_inf), map(self.copies.get, weights)
            self._update(weights, gradients, sums, rates, *scalars, list(copies))
            torch._foreach_add_(steps, 1)
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))
        if self._update is None:
            super().step()

    def _state(self, weight: Tensor) -> dict[str, Tensor]:
        """As PyTorch would make it."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["sum"] = torch.zeros_like(weight)
        return state


def _update(device: str) -> Update | None:
    """What steps on this type of device; None = PyTorch's fused kernel."""
    if device == "cuda":
        try:
            from wavelet_lm.kernels.triton_adagrad import Launcher
        except ImportError:  # there is no Triton for this platform
            pass
        else:
            return Launcher()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return None if has_kernel("aten::_fused_adagrad_", device.upper()) else adagrad_
