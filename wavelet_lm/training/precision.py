"""Number formats of a training run: autocast, loss scaling, TF32."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from wavelet_lm import devices
from wavelet_lm.config import TrainingConfig
from wavelet_lm.errors import UserError
from wavelet_lm.training.float8 import refuse_without_float8
from wavelet_lm.training.optimizers import Optimizer
from wavelet_lm.training.weights import Weights

# Below this loss scale no gradient is left that fp16 could hold.
SMALLEST_SCALE = 2.0**-10


class LossScale:
    """What losses are multiplied by so that float16 holds their gradients; never read by the host.

    torch.amp.GradScaler's rule: half after an overflow, twice after `INTERVAL` steps without one.

    Attributes:
        value: 0-d float32 on the device, 1 where nothing is scaled.
    """

    FIRST, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000

    def __init__(self, device: torch.device, *, enabled: bool):
        self.enabled = enabled
        self.value = torch.full((), self.FIRST if enabled else 1.0, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, overflow: Tensor) -> None:
        """After each step; overflow: 0-d float32, 1 where it overflowed, else 0."""
        torch._amp_update_scale_(
            self.value, self._good_steps, overflow, self.GROWTH, self.BACKOFF, self.INTERVAL
        )

    def state_dict(self) -> dict[str, Any]:
        """As GradScaler has it, JSON-ready; empty where nothing is scaled."""
        if not self.enabled:
            return {}
        return {
            "scale": self.value.item(),
            "growth_factor": self.GROWTH,
            "backoff_factor": self.BACKOFF,
            "growth_interval": self.INTERVAL,
            "_growth_tracker": int(self._good_steps.item()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; where nothing is scaled, nothing is taken over."""
        if self.enabled:
            self.value.fill_(state["scale"])
            self._good_steps.fill_(state["_growth_tracker"])


class Precision:
    """How a run computes: forward under `autocast`, then `backward`, then `update`.

    Raises:
        UserError: the config asks for fp16 or fp8 and the device does not have it, or for fp16 and
            for weights that step in backward.
    """

    def __init__(self, config: TrainingConfig, device: torch.device):
        self.device, self._offloaded = device, config.fsdp_cpu_offload
        self.dtype = devices.amp_dtype(config, device)
        if self.dtype == torch.float16 and device.type != "cuda":
            raise UserError(
                f"amp_dtype fp16 needs a CUDA GPU and the device is {device};"
                " use --amp_dtype auto (fp32 on a CPU) or bf16"
            )
        if config.amp_dtype == "fp8" and config.use_amp:
            refuse_without_float8(device)
        if config.optimizer_in_backward and self.dtype == torch.float16:
            raise UserError(
                "optimizer_in_backward steps each weight before it is known whether fp16 has"
                " overflowed in another; use --amp_dtype bf16 or fp32"
            )
        self.scaler = LossScale(device, enabled=self.dtype == torch.float16)
        self._measures = config.track != "none" and not config.optimizer_in_backward
        tf32 = config.allow_tf32 and device.type == "cuda"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")

    def _steps_on_cpu(self) -> bool:
        return self.device.type == "cpu" or self._offloaded

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return devices.autocast(self.device, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss (0-d), scaled where float16 needs it."""
        (loss * self.scaler.value if self.scaler.enabled else loss).backward()

    def update(self, optimizer: Optimizer, weights: Weights, grad_clip: float) -> Tensor | None:
        """Clip the gradients and step; with loss scaling a step that overflowed is skipped.

        One pass reads the gradients for their norm. On a GPU the step's own pass does the rest, and
        the host waits for none of it; on a CPU the norm says whether anything is to be clipped.

        Returns:
            The norm of the gradients before they were clipped, 0-d; None where neither clipping nor
            a tracker asks for it.
        """
        scaler = self.scaler
        if not grad_clip and not scaler.enabled:
            norm = weights.norm(optimizer.gradients()) if self._measures else None
            optimizer.step()
            return norm
        gradients = optimizer.gradients()
        norm = weights.norm(gradients)
        if self._steps_on_cpu() and not scaler.enabled and not optimizer.copies:
            factor = grad_clip / (norm + 1e-6)
            if not bool(factor >= 1):  # also where it is NaN, which is not to go unnoticed
                torch._foreach_mul_(gradients, factor)
            optimizer.step()
            return norm
        norm = norm / scaler.value
        divisor = ((norm + 1e-6) / grad_clip).clamp(min=1) if grad_clip else torch.ones_like(norm)
        if not scaler.enabled:
            optimizer.step(divisor)
            return norm
        # The norm is of all gradients: an overflow in those of one optimizer stops every one.
        overflow = (~norm.isfinite()).float()
        optimizer.step(divisor * scaler.value, overflow)
        scaler.update(overflow)
        return norm


def collapsed(scale: float) -> bool:
    """Whether the loss scale has shrunk so far that every step overflows."""
    return scale < SMALLEST_SCALE
