"""Number formats of a training run: autocast, loss scaling, TF32."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from wavelet_lm import devices
from wavelet_lm.config import TrainingConfig
from wavelet_lm.errors import UserError
from wavelet_lm.training.optimizers import Optimizer

# Below this loss scale no gradient is left that fp16 could hold.
SMALLEST_SCALE = 2.0**-10


class Precision:
    """How a run computes: forward under `autocast`, then `backward`, then `update`.

    Raises:
        UserError: the config asks for fp16 and the device is a CPU.
    """

    def __init__(self, config: TrainingConfig, device: torch.device):
        self.device = device
        self.dtype = devices.amp_dtype(config, device)
        if self.dtype == torch.float16 and device.type != "cuda":
            raise UserError(
                f"amp_dtype fp16 needs a CUDA GPU and the device is {device};"
                " use --amp_dtype auto (fp32 on a CPU) or bf16"
            )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        tf32 = config.allow_tf32 and device.type == "cuda"
        torch.set_float32_matmul_precision("high" if tf32 else "highest")

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return devices.autocast(self.device, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss (0-d), scaled where float16 needs it."""
        self.scaler.scale(loss).backward()

    def update(self, optimizer: Optimizer, model: nn.Module, grad_clip: float) -> None:
        """Clip the gradients and step; with loss scaling a step that overflowed is skipped."""
        for part in optimizer.parts:
            self.scaler.unscale_(part)
        overflow = False
        if grad_clip:
            norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
            # An overflow in one optimizer's gradients has now spread to those of the other, for
            # which the scaler would not know it.
            overflow = self.scaler.is_enabled() and not bool(norm.isfinite())
        if not overflow:
            for part in optimizer.parts:
                self.scaler.step(part)
        self.scaler.update()

    @property
    def collapsed(self) -> bool:
        """Whether the loss scale has shrunk so far that every step overflows."""
        return self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE
