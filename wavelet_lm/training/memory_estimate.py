"""An estimate of the memory that training takes, before it starts."""

import contextlib
import os
from pathlib import Path

import torch

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.losses import GRADIENT_CHUNK_ELEMENTS
from wavelet_lm.models.registry import n_params
from wavelet_lm.roles import maps, n_saved
from wavelet_lm.training.muon import STACK_BYTES, stacks
from wavelet_lm.training.optimizers import STATE_BYTES

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


def estimate_bytes(model: LanguageModel) -> int:
    """Weights, gradients, optimizer state, what backward needs, and one chunk of logits.

    What is saved for the backward pass of a position every module declares (`wavelet_lm/roles.py`).
    What the optimizer's step takes for itself comes when that is gone.
    """
    config = model.config
    fixed = n_params(model) * (8 + STATE_BYTES[config.optimizer])
    positions = config.micro_batch_size * config.block_size
    logits = 2 * 4 * min(GRADIENT_CHUNK_ELEMENTS["cuda"], positions * model.vocab_size)
    return fixed + max(4 * positions * n_saved(model) + logits, step_bytes(model))


def step_bytes(model: LanguageModel) -> int:
    """What a step of the optimizer takes and gives back: of Muon its largest stack."""
    if model.config.optimizer != "Muon":
        return 0
    return STACK_BYTES * max(sum(p.numel() for p in stack) for stack in stacks([*maps(model)]))


def available_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or the whole memory of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_what_cannot_train(model: LanguageModel, device: torch.device) -> None:
    """Raise UserError where this device is too slow for a model of that size, or too small."""
    config = model.config
    refuse_large_model_on_cpu(config, n_params(model), device)
    needed, available = estimate_bytes(model), available_bytes(device)
    if needed > available:
        raise UserError(
            f"this config needs about {needed / GiB:.1f} GiB and {device} has"
            f" {available / GiB:.1f} GiB; lower micro_batch_size ({config.micro_batch_size}),"
            f" block_size ({config.block_size}), C ({config.C}) or layers ({config.layers})"
        )


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
