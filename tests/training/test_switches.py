"""Every switch of the model, alone, through the command that a user types."""

import argparse
import inspect
import json

import pytest

from tests.training import runs

# A switch that needs company comes with it.
SWITCHES = [
    "--untied_reconstruction",
    "--no_shared_lifting_weights",
    "--no_shared_lifting_weights --multi_basis_lifting",
    "--lifting_linear_only",
    "--lifting_hidden_mult 2",
    "--lifting_init zero",
    "--lifting_init random",
    "--lifting_dropout 0.1",
    "--no_wavelet_crawl",
    "--wavelet_crawl_k 9",
    "--wavelet_mode haar --no_wavelet_crawl",
    "--wavelet_packets --levels 3 --per_scale_mixer_widths none",
    "--lifting_data_dependent 8",
    "--phase_gating",
    "--delta_memory",
    "--delta_memory --delta_heads 2 --delta_key_dim 8 --delta_value_dim 16 --delta_bands 0",
    "--delta_memory --delta_bands 2 --wavelet_mode haar --no_wavelet_crawl",
    "--delta_memory --delta_activation identity",
    "--delta_memory --delta_activation square --delta_key_dim 6",
    "--delta_memory --delta_after_mixing --no_decompose_bypass --mlp_activation relu2",
    "--hadamard_top_k 32",
    "--wavelet_decomp_norm",
    "--wavelet_recon_norm",
    "--mixer_transform identity",
    "--mixer_depth 2",
    "--mixer_depth 2 --mixer_depth_stabilizers",
    "--mixer_depth 2 --mixer_depth_residuals",
    "--mixer_exp_parametrization",
    "--no_cross_scale_gating",
    "--no_use_mixer_gate --no_cross_scale_gating",
    "--mixer_gate_activation gelu",
    "--per_scale_mixer_widths none",
    "--low_rank 0",
    "--skip_proj_out",
    "--no_learned_residual",
    "--no_per_layer_embedding",
    "--no_decompose_bypass",
    "--decompose_bypass_ema",
    "--data_order sequential --decompose_bypass_cross_window",
    "--repeated_passages 0.5",
    "--data_order sequential --carry_state --repeated_passages 0.5 --delta_memory",
    "--mlp_expansion 0",
    "--mlp_layers 3",
    "--pkm_enabled --pkm_num_keys 64 --pkm_heads 2",
    "--fwpkm_enabled --fwpkm_num_keys 64 --fwpkm_inference_updates",
    "--tie_embedding_to_lm_head",
    "--looped_blocks --looped_blocks_count 2",
    "--loop_iterations 2",
    "--stochastic_depth_rate 0.2",
    "--gradient_checkpointing",
    "--stable_parametrization",
    "--multinodal_enabled --multinodal_cell_dim 32 --multinodal_num_cells 2",
    "--multinodal_enabled --multinodal_cell_dim 32 --multinodal_cross_cell_gating",
    "--multinodal_enabled --multinodal_cell_dim 32 --multinodal_features_per_cell 24",
    *(f"--dropout_{place} 0.1" for place in ("embedding", "mixer", "projection", "mlp", "lm_head")),
    *(f"--stab_{name}" for name in ("embed_scaling", "ff_scaling", "proj_out_scaling")),
    *(f"--stab_{name}" for name in ("mixer_eps_scaling", "spectral_norm")),
    "--stab_lifting_level_scaling",
]


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
def test_fifty_steps_lower_the_loss(switch, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(inspect.getsource(argparse), encoding="utf-8")
    done = runs.finished(
        *("--config", runs.ROOT / "configs" / "shakespeare_char.json", "--dataset", text),
        *("--max_steps", 50, "--eval_batches", 4, "--num_new_tokens", 20, "--log_interval", 1),
        *("--out_dir", tmp_path / "logs", "--cache_dir", tmp_path / "cache"),
        *("--runs_file", "none", *switch.split()),
    )
    assert done.returncode == 0, done.stderr
    (metrics,) = (tmp_path / "logs").glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluations = [row["val_loss"] for row in rows if row["event"] == "eval"]
    assert evaluations[-1] < evaluations[0] - 0.5
