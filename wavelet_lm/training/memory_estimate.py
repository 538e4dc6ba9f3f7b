"""An estimate of the memory that training takes, before it starts."""

import contextlib
import os
from pathlib import Path

import torch

from wavelet_lm.config import Config
from wavelet_lm.errors import UserError
from wavelet_lm.kernels.delta_rule import CHUNK
from wavelet_lm.models.losses import CHUNK_ELEMENTS
from wavelet_lm.training.optimizers import STATE_BYTES

GiB = 2**30
# A CPU trains models of a few million parameters; beyond this a step takes minutes.
MAX_CPU_PARAMETERS = 100_000_000


def refuse_large_model_on_cpu(config: Config, n_params: int, device: torch.device) -> None:
    """Stop a large model that landed on the CPU only because there is no GPU."""
    if device.type == "cpu" and config.device == "auto" and n_params > MAX_CPU_PARAMETERS:
        raise UserError(
            f"this config has {n_params / 1e6:.0f}M parameters and there is no CUDA GPU; on a CPU"
            " try --config configs/quickstart.json or --config configs/shakespeare_char.json"
            " (--device cpu insists)"
        )


def estimate_bytes(config: Config, n_params: int, vocab_size: int) -> int:
    """Weights, gradients, optimizer state, activations kept for backward, and one logits chunk.

    The activations count what each block keeps per position, in units of its channels: about 6
    vectors per split and lifting layer (inputs, hidden and outputs of the nets), 12 per scale
    (bands, gates, products, transforms, dropout), the MLP's hidden layers, and 10 more; a delta
    memory its features, 7 vectors of keys and 8 of values, and its state at every chunk. A GPT's
    block keeps 16 and its MLP's, and its head three times its units.
    """
    fixed = n_params * (8 + STATE_BYTES[config.optimizer])
    net_vectors = 1 if config.lifting_linear_only else 2 * config.lifting_hidden_mult
    per_block = config.padded_channels * (
        (config.n_scales - 1) * (4 + 3 * net_vectors) + 12 * config.n_scales
    ) + config.C * (10 + 2 * config.mlp_expansion * (config.mlp_layers - 1))
    if config.delta_memory:
        keys, values = (
            config.delta_heads * d for d in (config.delta_key_dim, config.delta_value_dim)
        )
        per_block += config.C + config.delta_bands * config.padded_channels
        per_block += 7 * keys + 8 * values + keys * config.delta_value_dim // CHUNK
    positions = config.micro_batch_size * config.block_size
    if config.model != "wavelet_lm":
        per_block = config.C * (16 + 2 * config.gpt_mlp_expansion)
        fixed += 4 * positions * 3 * config.head_hidden
    activations = positions * (config.layers * per_block + 4 * config.C) * 4
    logits = 3 * 4 * min(CHUNK_ELEMENTS["cuda"], positions * vocab_size)
    return fixed + activations + logits


def available_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or the whole memory of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_what_cannot_train(
    config: Config, n_params: int, vocab_size: int, device: torch.device
) -> None:
    """Raise UserError where this device is too slow for a model of that size, or too small."""
    refuse_large_model_on_cpu(config, n_params, device)
    needed, available = estimate_bytes(config, n_params, vocab_size), available_bytes(device)
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
