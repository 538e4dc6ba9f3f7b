"""An estimate of the memory that training takes, before it starts."""

import contextlib
import os
from pathlib import Path

import torch

from wavelet_lm import devices
from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.registry import n_params
from wavelet_lm.training.rehearsal import Rehearsal, rehearse

GiB = 2**30
# A CPU trains models of a few million parameters; beyond this a step takes minutes.
MAX_CPU_PARAMETERS = 100_000_000


def refuse_large_model_on_cpu(config: Config, size: int, device: torch.device) -> None:
    """Stop a model of `size` parameters that landed on the CPU only because there is no GPU."""
    if device.type == "cpu" and config.device == "auto" and size > MAX_CPU_PARAMETERS:
        raise UserError(
            f"this config has {size / 1e6:.0f}M parameters and there is no CUDA GPU; on a CPU"
            " try --config configs/quickstart.json or --config configs/shakespeare_char.json"
            " (--device cpu insists)"
        )


def estimate(model: LanguageModel, device: torch.device) -> Rehearsal:
    """What a step of training such a model takes on a device."""
    dtype = devices.amp_dtype(model.config, device)
    return rehearse(model.config, model.vocab_size, device.type, dtype)


def available_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or the whole memory of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_what_cannot_train(model: LanguageModel, device: torch.device) -> None:
    """Raise UserError where this device is too slow for a model of that size, or too small."""
    config = model.config
    refuse_large_model_on_cpu(config, n_params(model), device)
    needed, available = estimate(model, device), available_bytes(device)
    if needed.peak > available:
        raise UserError(
            f"this config needs about {needed.peak / GiB:.1f} GiB and {device} has"
            f" {available / GiB:.1f} GiB; {savings(config, device)}"
        )
    host = available_bytes(torch.device("cpu"))
    if needed.on_host > host:
        raise UserError(
            f"optimizer_offload needs about {needed.on_host / GiB:.1f} GiB of the CPU's memory and"
            f" it has {host / GiB:.1f} GiB; try optimizer {config.optimizer}8bit"
        )


def savings(config: Config, device: torch.device) -> str:
    """What a user whose model does not fit can type, in words."""
    switches = {
        "gradient_checkpointing": config.gradient_checkpointing is not True,
        "optimizer_in_backward": not config.optimizer_in_backward and config.grad_accum == 1,
        "optimizer_offload": not config.optimizer_offload and device.type != "cpu",
        f"optimizer {config.optimizer}8bit": config.optimizer in ("Adagrad", "AdamW"),
    }
    flags = [f"--{flag}" for flag, helps in switches.items() if helps]
    words = f"try {', '.join(flags)}, or " if flags else ""
    keys = ["micro_batch_size", "block_size", "C", "layers"]
    if config.model == "wavelet_lm":
        keys.append("levels")
    sizes = [f"{key} ({getattr(config, key)})" for key in keys]
    return f"{words}lower {', '.join(sizes[:-1])} or {sizes[-1]}"


def peak_bytes(device: torch.device) -> int:
    """Peak so far: of the GPU's allocator, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Let the peak count from here on; a process's own only where Linux allows it."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
