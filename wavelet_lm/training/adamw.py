"""AdamW with its clipping and the scale of its gradients in the step's own pass, copies too."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wavelet_lm.kernels.adamw import Rates
from wavelet_lm.training.working_weights import Copies, with_gradients

Update = Callable[..., None]


class AdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW, its state included; on CUDA one pass that knows of copies.

    Where there is no Triton it is PyTorch's there too, on gradients in float32.

    Args:
        groups: of weights with a decay `weight_decay`.
        copies: as `WorkingWeights.copies`, whose gradients it reads.

    Attributes:
        grad_scale, found_inf: as Adagrad's (`adagrad.py`), which PyTorch's step reads.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        copies: Copies | None = None,
    ):
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
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
        if self._update is None:
            super().step()
            return
        for group in self.param_groups:
            weights, gradients = with_gradients(group["params"], self.copies)
            if not weights:
                continue
            states = [self._state(p) for p in weights]
            firsts, seconds, steps = (
                [state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")
            )
            rates = Rates(group["lr"], group["weight_decay"], group["betas"], group["eps"])
            torch._foreach_add_(steps, 1)
            scalars, copies = (self.grad_scale, self.found_inf), map(self.copies.get, weights)
            moments = (firsts, seconds, steps)
            self._update(weights, gradients, *moments, rates, *scalars, list(copies))
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def _state(self, weight: Tensor) -> dict[str, Tensor]:
        """As PyTorch would make it."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        return state


def _update(device: str) -> Update | None:
    """What steps on this type of device; None = PyTorch's fused kernel."""
    if device != "cuda":
        return None
    try:
        from wavelet_lm.kernels.triton_adamw import Launcher
    except ImportError:  # there is no Triton for this platform
        return None
    return Launcher()
