"""Keys that contradict each other, part by part; each check names what to change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from wavelet_lm.config.model import WAVELET_GPT_KEYS
from wavelet_lm.config.option import ConfigError, show

if TYPE_CHECKING:
    from wavelet_lm.config.config import Config

MAX_PACKET_LEVELS = 6
# Of keys whose products of pairs are taken: 131,328 of them.
MAX_SQUARE_KEY = 512
# Switches of the wavelet model that would change what a GPT is, and it has none of.
WAVELET_LM_ALONE = (
    "looped_blocks",
    "loop_iterations",
    "stochastic_depth_rate",
    "stable_parametrization",
    "fwpkm_inference_updates",
    "multinodal_enabled",
)


def check_contradictions(c: Config) -> None:
    """Raise `ConfigError` for the first keys that cannot be had together."""
    for check in (_wavelet, _baseline, _mixer, _memories, _ensemble, _run, _memory_of_a_run):
        check(c)


def cell_config(config: Config) -> Config:
    """The config of one cell of a multinodal model."""
    return config.replace(
        C=config.multinodal_cell_dim,
        multinodal_enabled=False,
        multinodal_features_per_cell=0,
        multinodal_cross_cell_gating=False,
    )


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ConfigError(message)


def _default(c: Config, key: str) -> Any:
    return type(c).__dataclass_fields__[key].default


def _wavelet(c: Config) -> None:
    _refuse(
        c.wavelet_packets and c.levels > MAX_PACKET_LEVELS,
        f"wavelet_packets doubles the scales with every level and levels is {c.levels};"
        f" use levels {MAX_PACKET_LEVELS} or less",
    )
    _refuse(
        c.wavelet_crawl and c.wavelet_crawl_k % 2 == 0,
        f"wavelet_crawl_k is {c.wavelet_crawl_k}; it must be odd",
    )
    _refuse(
        c.wavelet_mode == "haar" and c.wavelet_crawl,
        "wavelet_mode haar has fixed filters and cannot crawl; set wavelet_crawl to false",
    )
    _refuse(
        c.multi_basis_lifting and c.shared_lifting_weights,
        "multi_basis_lifting needs wavelets of its own in every block;"
        " set shared_lifting_weights to false",
    )
    for key in ("multi_basis_lifting", "untied_reconstruction", "lifting_data_dependent"):
        _refuse(
            c.wavelet_mode == "haar" and bool(getattr(c, key)),
            f"wavelet_mode haar has fixed filters and no {key}; set {key} to"
            f" {show(_default(c, key))}",
        )
    _refuse(
        c.decompose_bypass_ema and not c.decompose_bypass,
        "decompose_bypass_ema is a form of decompose_bypass, which is off; set it to true",
    )
    n_details = c.n_scales - 1
    _refuse(
        c.delta_memory and c.delta_bands > n_details,
        f"delta_bands is {c.delta_bands} and the wavelet has {n_details} details; give"
        f" {n_details} or less",
    )
    _refuse(
        c.delta_memory and len(c.delta_horizons) != 2,
        f"delta_horizons is {show(c.delta_horizons)}; it must be two numbers",
    )
    _refuse(
        c.delta_memory and c.delta_activation == "square" and c.delta_key_dim > MAX_SQUARE_KEY,
        f"delta_activation square takes all products of two numbers of a key and delta_key_dim is"
        f" {c.delta_key_dim}; use {MAX_SQUARE_KEY} or less",
    )
    _refuse(
        c.skip_proj_out and c.padded_channels != c.C,
        f"skip_proj_out needs C to be a power of two with mixer_transform fwht, and C is {c.C};"
        f" use C {c.padded_channels}, mixer_transform identity, or keep the projection",
    )


def _baseline(c: Config) -> None:
    """Keys at odds with model gpt or wavelet_gpt, and those that only wavelet_gpt reads."""
    for key in WAVELET_GPT_KEYS:
        _refuse(
            c.model != "wavelet_gpt" and getattr(c, key) != _default(c, key),
            f"{key} is {show(getattr(c, key))} and model {c.model} has no moving averages;"
            f" set it to {show(_default(c, key))} or use model wavelet_gpt",
        )
    _refuse(
        c.wavelet_shared_kernels and c.wavelet_module != "learnable",
        f"wavelet_shared_kernels is for learnable kernels and wavelet_module is {c.wavelet_module};"
        " use wavelet_module learnable",
    )
    if c.model == "wavelet_lm":
        return
    for key in WAVELET_LM_ALONE:
        _refuse(
            getattr(c, key) != _default(c, key),
            f"{key} belongs to model wavelet_lm and model is {c.model}; set it to"
            f" {show(_default(c, key))}",
        )
    _refuse(c.C % c.heads != 0, f"heads is {c.heads}; C ({c.C}) must be divisible by it")
    _refuse(
        c.tie_embedding_to_lm_head and c.head_hidden not in (0, c.C),
        f"tie_embedding_to_lm_head needs a head of C ({c.C}) inputs and head_hidden is"
        f" {c.head_hidden}; set head_hidden to 0",
    )


def _mixer(c: Config) -> None:
    widths = c.per_scale_mixer_widths
    packets = " with wavelet_packets" if c.wavelet_packets else ""
    _refuse(
        widths is not None and len(widths) != c.n_scales,
        f"per_scale_mixer_widths has {len(widths or ())} entries but levels {c.levels}{packets}"
        f" makes {c.n_scales} scales; give {c.n_scales} or none",
    )
    _refuse(
        c.cross_scale_gating and not c.use_mixer_gate,
        "cross_scale_gating routes what the gates read and use_mixer_gate is false;"
        " set cross_scale_gating to false",
    )
    for key in ("mixer_depth_stabilizers", "mixer_depth_residuals"):
        _refuse(
            getattr(c, key) and c.mixer_depth == 1,
            f"{key} acts on stacked mixers and mixer_depth is 1; raise mixer_depth or drop {key}",
        )
    _refuse(
        c.mixer_exp_parametrization and c.stab_spectral_norm,
        "mixer_exp_parametrization starts near the identity by itself; drop stab_spectral_norm",
    )
    _refuse(
        c.hadamard_top_k > c.padded_channels and not c.multinodal_enabled,
        f"hadamard_top_k is {c.hadamard_top_k} and a scale has {c.padded_channels} coefficients;"
        " give less, or 0 for all",
    )


def _memories(c: Config) -> None:
    _refuse(
        c.fwpkm_inference_updates and not c.fwpkm_enabled,
        "fwpkm_inference_updates adapts the second memory, which is off; set fwpkm_enabled to true",
    )
    for memory in ("pkm", "fwpkm"):
        keys, heads = getattr(c, f"{memory}_num_keys"), getattr(c, f"{memory}_heads")
        enabled = c.model == "wavelet_lm" and getattr(c, f"{memory}_enabled")
        _refuse(
            enabled and math.isqrt(keys) ** 2 != keys,
            f"{memory}_num_keys is {keys}; it must be a square number such as"
            f" {math.isqrt(keys) ** 2 or 1}",
        )
        _refuse(
            enabled and c.C % (2 * heads) != 0,
            f"{memory}_heads is {heads}; C ({c.C}) must be divisible by twice the heads",
        )


def _ensemble(c: Config) -> None:
    for key in ("multinodal_features_per_cell", "multinodal_cross_cell_gating"):
        _refuse(
            bool(getattr(c, key)) and not c.multinodal_enabled,
            f"{key} is a part of multinodal_enabled, which is off; set it to true",
        )
    if not c.multinodal_enabled:
        return
    _refuse(
        c.multinodal_features_per_cell > c.multinodal_cell_dim,
        f"multinodal_features_per_cell is {c.multinodal_features_per_cell}, more than"
        f" multinodal_cell_dim {c.multinodal_cell_dim}",
    )
    _refuse(
        c.multinodal_cross_cell_gating and c.multinodal_num_cells == 1,
        "multinodal_cross_cell_gating needs other cells and multinodal_num_cells is 1",
    )
    try:
        cell_config(c)
    except ConfigError as error:
        raise ConfigError(f"multinodal_cell_dim is the C of a cell, and {error}") from None


def _run(c: Config) -> None:
    _refuse(
        len(c.split) != 3 or abs(sum(c.split) - 1) > 1e-6 or min(c.split[:2]) <= 0,
        f"split is {show(c.split)}; it must be three fractions that sum to 1"
        " (train and valid above 0)",
    )
    _refuse(
        c.document_separator == "",
        "document_separator is empty; give a text such as <|endoftext|>, or leave it out",
    )
    _refuse(
        c.carry_state and c.data_order != "sequential",
        f"carry_state is for windows that follow each other and data_order is {c.data_order}; use"
        " sequential",
    )
    _refuse(
        c.carry_state and c.model != "wavelet_lm",
        f"carry_state needs a state of constant size, and that of model {c.model} grows with the"
        " text; leave it out",
    )
    _refuse(len(c.adam_betas) != 2, f"adam_betas is {show(c.adam_betas)}; it must be two numbers")
    _refuse(
        c.weight_decay_mode == "decoupled" and not c.optimizer.startswith("Adagrad"),
        f"weight_decay_mode is for Adagrad and Adagrad8bit and optimizer is {c.optimizer}, whose"
        " decay is decoupled always; leave weight_decay_mode out",
    )
    _refuse(
        c.fsdp_cpu_offload and c.parallel in ("none", "ddp"),
        f"fsdp_cpu_offload is for parallel fsdp and parallel is {c.parallel}; set it to false",
    )
    _refuse(
        c.fsdp_cpu_offload and c.amp_dtype == "fp16",
        "fsdp_cpu_offload does not scale the losses that fp16 needs scaled; use amp_dtype bf16",
    )
    _refuse(c.min_lr > c.lr, f"min_lr ({show(c.min_lr)}) is above lr ({show(c.lr)})")
    _refuse(
        c.benchmark_only and not c.benchmark_run_dir,
        "benchmark_only needs benchmark_run_dir, the run folder to evaluate",
    )


def _memory_of_a_run(c: Config) -> None:
    """What saves memory in training, and what it cannot be had with."""
    n_blocks = c.looped_blocks_count if c.looped_blocks else c.layers
    _refuse(
        c.recomputed(n_blocks) > n_blocks,
        f"gradient_checkpointing is {c.gradient_checkpointing} and a pass runs {n_blocks} blocks;"
        f" give {n_blocks} or less, or true for all",
    )
    _refuse(
        c.amp_dtype == "fp8" and not c.use_amp,
        "amp_dtype fp8 is mixed precision, which use_amp turns off; set use_amp to true",
    )
    early = "optimizer_in_backward steps each weight before the gradients of others are there"
    _refuse(
        c.optimizer_in_backward and c.grad_accum > 1,
        f"{early} and grad_accum is {c.grad_accum}; set it to 1 and raise micro_batch_size",
    )
    _refuse(
        c.optimizer_in_backward and c.grad_clip > 0,
        f"{early}, so nothing knows their norm, and grad_clip is {show(c.grad_clip)}; set it to 0",
    )
    _refuse(
        c.optimizer_in_backward and c.compile is True,
        f"{early} and a compiled backward pass returns all of them at once; set compile to auto,"
        " which then leaves it out, or false",
    )
