"""The `config.json` beside a published checkpoint, as a `Config` of this project.

Its keys are ours, but an absent key means what it meant when the file was written, which is not
always our default. Of the keys that this project does not have, those of training are ignored, and
switches of experiments are refused unless they are off, as are this project's own extensions.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from wavelet_lm.config import (
    FIELDS,
    Config,
    DataConfig,
    GenerationConfig,
    ModelConfig,
    TrainingConfig,
    read_json_object,
    show,
)
from wavelet_lm.errors import UserError

# What an absent key of the model means.
ABSENT: dict[str, Any] = {
    "wavelet_mode": "lifting",
    "lifting_hidden_mult": 1,
    "lifting_init": "haar",
    "multi_basis_inits": ["haar", "random"],
    "mixer_transform": "fwht",
    "per_scale_mixer_widths": None,
    "low_rank": 0,
    "use_mixer_gate": True,
    "mixer_gate_activation": "silu",
    "mixer_depth": 1,
    "decompose_bypass": True,
    "learned_residual": True,
    "mlp_expansion": 0,
    "mlp_layers": 2,
    "pkm_heads": 1,
    "fwpkm_heads": 1,
    "fwpkm_update_lr": 0.01,
    "fwpkm_chunk_size": 64,
    "lifting_dropout": 0.0,
    "dropout_embedding": 0.0,
    "dropout_mixer": 0.0,
    "dropout_projection": 0.0,
    "dropout_mlp": 0.0,
    "dropout_lm_head": 0.0,
    "loop_iterations": 1,
    "stochastic_depth_rate": 0.0,
    "multinodal_combination": "average",
    "multinodal_features_per_cell": -1,
    "multinodal_bagged_eps": 1e-6,
    "multinodal_cross_cell_gate_interval": 1,
    **dict.fromkeys(
        (
            "shared_lifting_weights",
            "lifting_linear_only",
            "wavelet_crawl",
            "wavelet_decomp_norm",
            "wavelet_recon_norm",
            "untied_reconstruction",
            "multi_basis_lifting",
            "cross_scale_gating",
            "mixer_depth_stabilizers",
            "mixer_depth_residuals",
            "mixer_exp_parametrization",
            "decompose_bypass_cross_window",
            "decompose_bypass_ema",
            "skip_proj_out",
            "per_layer_embedding",
            "pkm_enabled",
            "fwpkm_enabled",
            "fwpkm_inference_updates",
            "tie_embedding_to_lm_head",
            "looped_blocks",
            "gradient_checkpointing",
            "stable_parametrization",
            "stab_embed_scaling",
            "stab_ff_scaling",
            "stab_proj_out_scaling",
            "stab_mixer_eps_scaling",
            "stab_spectral_norm",
            "stab_lifting_level_scaling",
            "multinodal_enabled",
            "multinodal_cross_cell_gating",
        ),
        False,
    ),
}

# Keys without which nothing is known, by the switch that reads them ("" = every model).
NEEDED = {
    "": ("C", "layers", "levels"),
    "wavelet_crawl": ("wavelet_crawl_k",),
    "pkm_enabled": ("pkm_num_keys", "pkm_top_k"),
    "fwpkm_enabled": ("fwpkm_num_keys", "fwpkm_top_k"),
    "looped_blocks": ("looped_blocks_count",),
    "multinodal_enabled": ("multinodal_num_cells", "multinodal_cell_dim"),
}

# Keys of ModelConfig that are no part of the published family: all others, but the network's name.
EXTENSIONS = {spec.name for spec in fields(ModelConfig)} - {"model"} - ABSENT.keys()
EXTENSIONS -= {key for keys in NEEDED.values() for key in keys}

# Keys of the published program that change nothing of a trained model.
TRAINING_ONLY = {
    "checkpoint_interval_steps",
    "compile_mode",
    "decompose_bypass_bptt",
    "decompose_bypass_bptt_span",
    "generation_max_context",
    "multinodal_seeds",
}

# Experiments of the published program that this project has not: the value at which each is off,
# and how the names of its further keys begin.
EXPERIMENTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "wavelet_basis": ("real", ("complex_",)),
    "wavelet_2d_mode": ("off", ("wavelet_2d_",)),
    "lifting_offdiag_structure": (
        "none",
        ("lifting_offdiag_", "lifting_block_size", "lifting_band_width", "lifting_monarch_blocks"),
    ),
    "mlp_offdiag_structure": ("none", ("mlp_block_size", "mlp_band_width", "mlp_pq_")),
    "sparse_pq_embedding_enabled": (False, ("sparse_pq_embedding_",)),
    "sparse_encoder_decoder_embedding": (False, ("sparse_encoder_decoder_embedding_",)),
    "mixer_recurrence_steps": (1, ("mixer_recurrence_",)),
    "decompose_bypass_ssm": (False, ("decompose_bypass_ssm_",)),
    "fht_input_cap_enabled": (False, ("fht_input_cap_",)),
    "bbce_enabled": (False, ("bbce_", "block_size_compressed")),
}


def read_published_config(path: Path, names: Collection[str]) -> tuple[Config, list[str]]:
    """A published `config.json`, and those of its keys that were ignored.

    Args:
        path: the file.
        names: of the tensors in the checkpoint; they decide where a switch was not read.

    Raises:
        UserError: the file is missing or no JSON, a key is unknown, contradictory or lacking, or
            a switch has no published layout or is an extension of this project.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; a published checkpoint needs its config.json beside it")
    given = read_json_object(path)
    training = {spec.name for spec in fields(TrainingConfig)} | TRAINING_ONLY
    kept = {spec.name for part in (DataConfig, GenerationConfig) for spec in fields(part)}
    model = {spec.name for spec in fields(ModelConfig)} & (
        ABSENT.keys() | {key for keys in NEEDED.values() for key in keys}
    )
    values, ignored = dict(ABSENT), []
    for key, value in given.items():
        if key in model or key in kept:
            values[key] = value
        elif key in training or key.startswith("quantize_"):
            ignored.append(key)
        elif _is_off(key, value, given):
            continue
        elif key in EXTENSIONS:
            raise UserError(
                f"{path}: {key} is {show(value)}, an extension of this project that no published"
                " checkpoint has; put the config.json of its training beside it"
            )
        else:
            raise UserError(
                f"{path}: {key} is {show(value)}, which this project does not know; only published"
                " models without it can be imported"
            )
    _refuse_unmapped(path, values)
    return Config.from_dict(_translated(values, names), source=str(path)), ignored


def _is_off(key: str, value: Any, given: dict[str, Any]) -> bool:
    """Whether a key that is not ours says that its experiment does not take place."""
    if value is False or value is None or (key in FIELDS and value == FIELDS[key].default):
        return True
    for switch, (off, prefixes) in EXPERIMENTS.items():
        if key == switch:
            return value == off
        if key.startswith(prefixes):
            return given.get(switch, off) == off
    return False


def _refuse_unmapped(path: Path, values: dict[str, Any]) -> None:
    for switch, keys in NEEDED.items():
        for key in keys:
            if key not in values and (not switch or values[switch]):
                because = f", which {switch} needs" if switch else ""
                raise UserError(f"{path}: has no {key}{because}; it cannot be guessed")
    for key in ("decompose_bypass_ema", "mixer_exp_parametrization"):
        if values[key]:
            raise UserError(
                f"{path}: {key} is on, and checkpoints with it cannot be imported"
                " (their layout is not known)"
            )
    if values["untied_reconstruction"] and values["multi_basis_lifting"]:
        raise UserError(
            f"{path}: untied_reconstruction with multi_basis_lifting cannot be imported (the second"
            " wavelet has basis weights of its own, for which this project has no place)"
        )


def _translated(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The same function in our words: values renamed, switches that were never read turned off."""
    values = dict(values)
    if values["multinodal_combination"] == "average":
        values["multinodal_combination"] = "mean"
    # Bagging was an initial value of the embedding, and is in the file; after it nothing read it.
    values["multinodal_features_per_cell"] = 0
    values["multinodal_bagged_eps"] = 0.0
    off = []
    if not values["multinodal_enabled"]:
        off += ["multinodal_cross_cell_gating"]
    if values["wavelet_mode"] == "haar":
        off += ["wavelet_crawl", "untied_reconstruction", "multi_basis_lifting"]
    if values["multi_basis_lifting"]:
        off += ["shared_lifting_weights"]
        if not any(name.endswith("dilation_logits") for name in names):
            off += ["wavelet_crawl"]
    if not values["fwpkm_enabled"]:
        off += ["fwpkm_inference_updates"]
    if not values["use_mixer_gate"]:
        off += ["cross_scale_gating"]
    if values["mixer_depth"] == 1:
        off += ["mixer_depth_stabilizers", "mixer_depth_residuals"]
    else:
        values["per_scale_mixer_widths"] = None  # stacked mixers are all full
    C = values["multinodal_cell_dim" if values["multinodal_enabled"] else "C"]
    if values["mixer_transform"] == "fwht" and isinstance(C, int) and C & (C - 1):
        off += ["skip_proj_out"]  # not read where C has to be padded
    return values | dict.fromkeys(off, False)
