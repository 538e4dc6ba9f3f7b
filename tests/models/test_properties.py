"""Every combination of switches: what holds for all models, on configs drawn at random."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.conftest import perturb, tiny_config
from wavelet_lm.config import Config, ConfigError
from wavelet_lm.models.checkpoint import load_own_model, save_checkpoint
from wavelet_lm.models.registry import build_model
from wavelet_lm.models.wavelet_lm.model import Carry

V = 11
T = 24

flags = st.booleans()
SWITCHES = {
    "C": st.sampled_from([4, 6, 8]),
    "layers": st.integers(1, 3),
    "levels": st.integers(1, 4),
    "wavelet_mode": st.sampled_from(["lifting", "lifting", "haar"]),
    "shared_lifting_weights": flags,
    "lifting_linear_only": flags,
    "lifting_hidden_mult": st.integers(1, 2),
    "lifting_init": st.sampled_from(["haar", "zero", "random"]),
    "lifting_dropout": st.sampled_from([0.0, 0.2]),
    "wavelet_crawl": flags,
    "wavelet_crawl_k": st.sampled_from([3, 9]),
    "wavelet_decomp_norm": flags,
    "wavelet_recon_norm": flags,
    "untied_reconstruction": flags,
    "wavelet_packets": flags,
    "lifting_data_dependent": st.sampled_from([0, 2]),
    "multi_basis_lifting": flags,
    "multi_basis_inits": st.sampled_from([("haar", "random"), ("zero", "haar", "random")]),
    "mixer_transform": st.sampled_from(["fwht", "identity"]),
    "hadamard_top_k": st.sampled_from([0, 3]),
    "low_rank": st.sampled_from([0, 2]),
    "use_mixer_gate": flags,
    "mixer_gate_activation": st.sampled_from(["silu", "sigmoid", "gelu", "relu"]),
    "cross_scale_gating": flags,
    "mixer_depth": st.integers(1, 3),
    "mixer_depth_stabilizers": flags,
    "mixer_depth_residuals": flags,
    "mixer_exp_parametrization": flags,
    "decompose_bypass": flags,
    "decompose_bypass_ema": flags,
    "decompose_bypass_cross_window": flags,
    "data_order": st.sampled_from(["random", "sequential"]),
    "carry_state": flags,
    "delta_memory": flags,
    "delta_heads": st.integers(1, 2),
    "delta_key_dim": st.sampled_from([2, 3]),
    "delta_value_dim": st.sampled_from([2, 4]),
    "delta_bands": st.integers(0, 2),
    "delta_activation": st.sampled_from(["silu", "identity", "square"]),
    "delta_after_mixing": flags,
    "delta_horizons": st.sampled_from([(4, 150), (500, 2)]),
    "phase_gating": flags,
    "learned_residual": flags,
    "skip_proj_out": flags,
    "per_layer_embedding": flags,
    "mlp_expansion": st.sampled_from([0, 2]),
    "mlp_layers": st.integers(2, 3),
    "mlp_activation": st.sampled_from(["gelu", "relu2"]),
    "pkm_enabled": flags,
    "pkm_heads": st.integers(1, 2),
    "fwpkm_enabled": flags,
    "fwpkm_inference_updates": flags,
    "fwpkm_chunk_size": st.integers(2, 5),
    "tie_embedding_to_lm_head": flags,
    "looped_blocks": flags,
    "looped_blocks_count": st.integers(1, 3),
    "loop_iterations": st.integers(1, 2),
    "stochastic_depth_rate": st.sampled_from([0.0, 0.5]),
    "gradient_checkpointing": st.sampled_from([False, True, 1]),
    "stable_parametrization": flags,
    "embedding_std": st.sampled_from([None, 0.02]),
    "stab_embed_scaling": flags,
    "stab_spectral_norm": flags,
    "multinodal_enabled": st.sampled_from([False, False, True]),
    "multinodal_num_cells": st.integers(1, 3),
    "multinodal_cell_dim": st.sampled_from([4, 6]),
    "multinodal_combination": st.sampled_from(["mean", "sum"]),
    "multinodal_features_per_cell": st.sampled_from([0, 3]),
    "multinodal_cross_cell_gating": flags,
    "multinodal_cross_cell_gate_interval": st.integers(1, 2),
}
# Small enough for tests, and with dropout where its switch is not drawn.
FIXED = {
    "block_size": T,
    "pkm_num_keys": 9,
    "pkm_top_k": 2,
    "fwpkm_num_keys": 9,
    "fwpkm_top_k": 2,
    "fwpkm_heads": 1,
    "per_scale_mixer_widths": None,
}


@st.composite
def configs(draw) -> Config:
    """A valid config; a refused combination must be one line, and is drawn again."""
    values = {**FIXED, **draw(st.fixed_dictionaries(SWITCHES))}
    levels = values["levels"]
    n_scales = 2**levels if values["wavelet_packets"] else levels + 1
    if draw(flags):
        values["per_scale_mixer_widths"] = tuple(
            draw(st.sampled_from([0.3, 0.5, 1.0])) for _ in range(n_scales)
        )
    try:
        return tiny_config(**values)
    except ConfigError as error:
        assert "\n" not in str(error)
        assume(False)
        raise


def make(config: Config, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return perturb(build_model(config, V).to(dtype)).eval()


def tokens(B: int = 2) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def some_window(model) -> Carry | None:
    """A training window that follows another one, where the config hands anything on."""
    carry = model.first_window(2, torch.device("cpu"))
    return None if carry is None else Carry(torch.randn_like(carry.mean.double()))


quickly = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@quickly
@given(configs())
def test_gradients_are_finite_and_reach_every_parameter(config):
    assume(config.mixer_gate_activation != "relu")  # a narrow gate of it may be closed everywhere
    model = make(config)
    if config.stochastic_depth_rate == 0:
        model.train()  # a dropped block has no gradient
    loss, _ = model.loss(tokens(), tokens().roll(1, 1), some_window(model))
    loss.backward()
    assert loss.isfinite()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert name.endswith(("blocks.0.bypass.cross_layer_mix.weight", "W.noise")), name
            continue
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@quickly
@given(configs(), st.integers(1, T - 1))
def test_the_future_changes_no_bit(config, t):
    model = make(config)
    changed = tokens()
    changed[:, t:] = (changed[:, t:] + 1) % V
    assert torch.equal(model(tokens())[0][:, :t], model(changed)[0][:, :t])


@quickly
@given(configs(), st.lists(st.integers(1, T - 1), max_size=6, unique=True))
def test_any_chunks_give_the_same_logits(config, cuts):
    model = make(config)
    whole, _ = model(tokens())
    bounds = [0, *sorted(cuts), T]
    state, parts = None, []
    for start, end in pairwise(bounds):
        logits, state = model(tokens()[:, start:end], state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@quickly
@given(configs())
def test_what_is_saved_is_what_is_loaded(config):
    model = make(config, torch.float32)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_checkpoint(path, model, {})
        loaded = load_own_model(path)
    assert loaded.config == config
    assert torch.equal(loaded(tokens())[0], model(tokens())[0])


def assert_compiles(config: Config, backend: str) -> None:
    torch.compiler.reset()
    model = make(config, torch.float32)
    idx = tokens()
    eager, _ = model.loss(idx, idx.roll(1, 1))
    eager.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled, _ = torch.compile(model.loss, backend=backend)(idx, idx.roll(1, 1))
    compiled.backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4 * max(1, float(b.abs().max())))


@settings(quickly, max_examples=2)
@given(configs())
def test_compiled_is_the_same_in_aot_eager(config):
    assert_compiles(config, "aot_eager")


def test_compiled_is_the_same_in_inductor():
    assert_compiles(tiny_config(layers=1, levels=2, per_scale_mixer_widths=(1, 1, 0.5)), "inductor")


@pytest.mark.slow
@settings(quickly, max_examples=12)
@given(configs())
def test_a_dozen_compiled_in_inductor(config):
    assert_compiles(config, "inductor")
