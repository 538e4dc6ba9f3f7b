"""Where a model runs, in which precision, and that it runs to be read, not trained."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from wavelet_lm.config import TrainingConfig
from wavelet_lm.errors import UserError

AMP_DTYPES = {
    "fp8": torch.bfloat16,  # around its products
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def resolve_device(name: str) -> torch.device:
    """`auto` (the GPU if there is one), `cpu`, `cuda` or `cuda:N`, as a device that exists.

    A GPU that is named becomes the current one, where kernels run that are not told where.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", name)
    if match is None:
        raise UserError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_devices == 0:
        raise UserError(f"device is {name}, but PyTorch sees no CUDA GPU here; use cpu or auto")
    if match[1] is None:
        return torch.device("cuda", torch.cuda.current_device())
    if int(match[1]) >= n_devices:
        raise UserError(f"device is {name}, but the last CUDA GPU here is cuda:{n_devices - 1}")
    torch.cuda.set_device(int(match[1]))
    return torch.device("cuda", int(match[1]))


def amp_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """What matrix products are computed in; float32 means no mixed precision."""
    if not config.use_amp:
        return torch.float32
    if config.amp_dtype != "auto":
        return AMP_DTYPES[config.amp_dtype]
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision in `dtype`; for float32 a context that does nothing. Can be re-entered."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; a model in training is in training again after it."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()
