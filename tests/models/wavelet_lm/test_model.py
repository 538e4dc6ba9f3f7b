"""The whole model: counts, causality, chunks, formulas, gradients."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils._pytree import tree_leaves

from tests.conftest import perturb, tiny_config
from wavelet_lm.config import Config
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.models.wavelet_lm.mixer import LargestCoefficients
from wavelet_lm.models.wavelet_lm.model import Carry
from wavelet_lm.transforms.hadamard import hadamard_transform

ROOT = Path(__file__).parents[3]
V = 23

VARIANTS = {
    "headline": {},
    "padded": {"C": 20},
    "identity transform": {"mixer_transform": "identity", "C": 20},
    "no crawl, full widths": {"wavelet_crawl": False, "per_scale_mixer_widths": None},
    "haar": {"wavelet_mode": "haar", "wavelet_crawl": False},
    "own lifting per block": {"shared_lifting_weights": False, "lifting_linear_only": True},
    "norms": {"wavelet_decomp_norm": True, "wavelet_recon_norm": True, "skip_proj_out": True},
    "no gate, no routing": {"use_mixer_gate": False, "cross_scale_gating": False, "low_rank": 0},
    "no bypass": {"decompose_bypass": False, "per_layer_embedding": False},
    "plain residuals": {"learned_residual": False},
    "nothing but wavelets": {"mlp_expansion": 0, "pkm_enabled": False, "fwpkm_enabled": False},
    "untied reconstruction": {"untied_reconstruction": True},
    "two bases": {"multi_basis_lifting": True, "shared_lifting_weights": False},
    "packets": {"wavelet_packets": True, "per_scale_mixer_widths": None},
    "haar packets": {
        "wavelet_packets": True,
        "wavelet_mode": "haar",
        "wavelet_crawl": False,
        "per_scale_mixer_widths": (1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25),
    },
    "phase gating": {"phase_gating": True, "C": 20},
    "delta memory": {"delta_memory": True, "delta_bands": 2, "C": 20},
    "delta memory after mixing": {"delta_memory": True, "delta_after_mixing": True},
    "delta memory of the input": {"delta_memory": True, "delta_bands": 0, "delta_value_dim": 3},
    "data-dependent lifting": {"lifting_data_dependent": 3},
    "largest coefficients": {"hadamard_top_k": 5},
    "largest channels, deep": {
        "hadamard_top_k": 5,
        "mixer_transform": "identity",
        "mixer_depth": 2,
        "phase_gating": True,
    },
    "deep mixers": {"mixer_depth": 3},
    "deep, stabilized": {
        "mixer_depth": 2,
        "mixer_depth_stabilizers": True,
        "mixer_depth_residuals": True,
        "per_scale_mixer_widths": None,
    },
    "exponential mixers": {"mixer_exp_parametrization": True},
    "exponential mean": {"decompose_bypass_ema": True},
    "looped block": {"looped_blocks": True, "looped_blocks_count": 3},
    "two passes": {"loop_iterations": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "multinodal": {
        "multinodal_enabled": True,
        "multinodal_num_cells": 3,
        "multinodal_cell_dim": 16,
        "multinodal_features_per_cell": 12,
        "multinodal_bagged_eps": 0.1,
        "multinodal_cross_cell_gating": True,
        "loop_iterations": 2,
    },
    "multinodal sum": {
        "multinodal_enabled": True,
        "multinodal_num_cells": 2,
        "multinodal_cell_dim": 8,
        "multinodal_combination": "sum",
    },
    "stable": {"stable_parametrization": True},
    "tied": {"tie_embedding_to_lm_head": True, "mlp_layers": 3},
}


def make(dtype=torch.float64, **overrides):
    torch.manual_seed(0)
    return perturb(build_model(tiny_config(**overrides), V).to(dtype)).eval()


def tokens(B: int = 2, T: int = 40) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


# --- parameter counts ------------------------------------------------------------------------


def test_headline_has_exactly_its_parameters():
    config = Config.from_json(ROOT / "config.json")
    with torch.device("meta"):
        model = build_model(config, 50257)
    block = model.blocks[0]
    assert n_params(model) == 882_511_981
    assert n_params(model.wavelets) == 83_927_055
    assert n_params(model.embedding) == n_params(model.head) == 102_926_336
    assert n_params(block.mixer.scales) == 44_113_920
    assert n_params(block.feedforward.branches["mlp"]) == 167_815_168
    assert n_params(block.feedforward.branches["pkm"]) == 38_010_880
    assert n_params(block.feedforward.branches["fwpkm"]) == 38_010_880


def test_mini_has_exactly_its_parameters():
    config = Config.from_json(ROOT / "configs" / "mini.json")
    with torch.device("meta"):
        assert n_params(build_model(config, 50257)) == 72_875_467


def test_config_json_holds_the_defaults_but_for_auto():
    """The root config is the default one; compile and amp_dtype say there what auto would find."""
    stated = json.loads((ROOT / "config.json").read_text())
    differing = {k for k, v in Config().to_dict().items() if k in stated and stated[k] != v}
    assert differing == {"compile", "amp_dtype"}


# --- time ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_future_changes_no_bit_of_the_past(variant):
    model = make(**VARIANTS[variant])
    idx = tokens()
    changed = idx.clone()
    changed[:, 25:] = (idx[:, 25:] + 1) % V
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


def test_the_past_reaches_every_later_position():
    model = make()
    changed = tokens()
    changed[:, 0] = (changed[:, 0] + 1) % V
    difference = (model(tokens())[0] - model(changed)[0]).abs().amax(-1)
    assert (difference > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [[1] * 40, [13, 1, 26], [39, 1]])
def test_any_chunks_give_the_same_logits(variant, lengths):
    model = make(**VARIANTS[variant])
    idx = tokens()
    whole, _ = model(idx)
    state, parts = None, []
    for chunk in idx.split(lengths, dim=1):
        logits, state = model(chunk, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


def test_chunks_in_float32_stay_within_the_target():
    """targets.md: at most 1e-4 of the logits' range."""
    model = make(torch.float32)
    idx = tokens(T=200)
    whole, _ = model(idx)
    state, parts = None, []
    for chunk in idx.split(1, dim=1):
        logits, state = model(chunk, state)
        parts.append(logits)
    error = (torch.cat(parts, 1) - whole).abs().max()
    assert error <= 1e-4 * (whole.max() - whole.min())


def test_a_state_can_be_continued_twice():
    """Calling never changes the state that was passed in: two futures of one past."""
    model = make()
    _, state = model(tokens())
    first = model(tokens(), state)[0]
    model(tokens() * 0, state)
    assert torch.equal(model(tokens(), state)[0], first)


def test_last_only_is_the_last_position():
    model = make()
    torch.testing.assert_close(model(tokens(), last_only=True)[0], model(tokens())[0][:, -1:])


def test_carry_is_the_previous_mean_of_the_first_block():
    config = {"data_order": "sequential"}
    model = make(**config)
    _, state = model(tokens())
    carry = model.next_window(state).mean
    assert carry.shape == (2, 16)
    without, zero = model(tokens())[0], model(tokens(), Carry(torch.zeros_like(carry)))[0]
    torch.testing.assert_close(without, zero, rtol=0, atol=1e-12)
    assert (model(tokens(), Carry(carry))[0] - without).abs().max() > 1e-3


@pytest.mark.parametrize("keys", [{}, {"delta_memory": True}, VARIANTS["multinodal"]])
def test_a_state_that_is_carried_is_dense(keys):
    """A compiler lays the first window's out unlike the next one's, and would compile for both."""
    model = make(data_order="sequential", carry_state=True, fwpkm_enabled=False, **keys)
    _, state = model.loss(tokens(), tokens())
    parts = [x for x in tree_leaves(model.next_window(state)) if isinstance(x, torch.Tensor)]
    assert parts and all(x.is_contiguous() for x in parts)


# --- values ----------------------------------------------------------------------------------


def reference_logits(model, idx):
    """The formulas of the model in the plainest form, for the headline switches, one text."""
    c = model.config
    Cp, S = c.padded_channels, c.n_scales
    H = torch.ones(1, 1, dtype=torch.float64)
    while H.shape[0] < Cp:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) / 2**0.5
    e = model.embedding.weight[idx]
    x, mean_prev = e, None
    lift = model.wavelets[0]
    for block in model.blocks:
        T = x.shape[0]
        mean = torch.stack([x[: t + 1].mean(0) for t in range(T)])
        g = mean
        if mean_prev is not None:
            g = g + mean_prev @ block.bypass.cross_layer_mix.weight.T
        x = x + block.embedding_gain * e
        cur = pad(block.norm1(x), (0, Cp - c.C))
        details = []
        for k in range(c.levels):
            delay = lift.delays[k]
            weights = delay.logits.softmax(0)
            past = torch.zeros_like(cur)
            for j, w in enumerate(weights):
                lag = delay.min_lag + j
                if lag < T:
                    past[lag:] += w * cur[: T - lag]
            d = (past - lift.predict[k](cur)) / 2**0.5
            cur = (cur + lift.update[k](d)) / 2**0.5
            details.insert(0, d)
        bands = [
            band + pad(block.bypass.gains[s] * g, (0, Cp - c.C))
            for s, band in enumerate([cur, *details])
        ]
        X = [band @ H for band in bands]
        mixed = []
        for s, mixer in enumerate(block.mixer.scales):
            gate = sum(block.mixer.routing[s, r] * X[r] for r in range(S))
            signal, inner = X[s], mixer
            if hasattr(mixer, "A"):
                signal, gate, inner = signal @ mixer.A.T, gate @ mixer.A.T, mixer.mixer
            y = (signal @ inner.W.T) * torch.nn.functional.silu(gate @ inner.G.T)
            y = y + (signal @ inner.V) @ inner.U.T
            if hasattr(mixer, "A"):
                y = y @ mixer.B.T
            mixed.append((y @ H) * block.scale_weights[s])
        r = mixed[0]
        for k in reversed(range(c.levels)):
            r = 2**0.5 * r - lift.update[k](mixed[c.levels - k])
        x = block.spectral_gain.gain * x + block.projection(r)
        h2 = block.feedforward.norm(x)
        m = sum(
            block.feedforward.gains[name].gain * branch(h2[None])[0]
            for name, branch in block.feedforward.branches.items()
        )
        x = block.feedforward_gain.gain * x + m
        mean_prev = mean
    return model.final_norm(x) @ model.head.weight.T


@pytest.mark.parametrize("C", [16, 20])
@pytest.mark.parametrize("T", [3, 40])
def test_logits_are_the_formulas(C, T):
    """Short texts rotate the signal, long ones the weights: both are the same function."""
    model = make(C=C)
    idx = tokens(1, T)
    torch.testing.assert_close(model(idx)[0][0], reference_logits(model, idx[0]), rtol=0, atol=1e-9)


def test_rotating_weights_or_signal_is_the_same():
    mixer = make().blocks[0].mixer
    bands = torch.randn(4, 2, 64, 16, dtype=torch.float64)
    assert bands[..., 0].numel() > mixer.n_weight_rows > bands[:, :1, :1, 0].numel()
    one_by_one = [mixer(bands[:, b : b + 1, t : t + 1]) for b in range(2) for t in range(64)]
    pieces = torch.cat(one_by_one, 2).view(4, 2, 64, 16)
    torch.testing.assert_close(mixer(bands), pieces, rtol=0, atol=1e-12)


@torch.no_grad()
def test_initial_values():
    torch.manual_seed(0)
    model = build_model(tiny_config(C=256, layers=1), 1000)
    block = model.blocks[0]
    assert model.embedding.weight.std() == pytest.approx(1 / 16, rel=0.02)
    mixer = block.mixer.scales[0]
    assert (mixer.W - torch.eye(256)).std() == pytest.approx(1e-3, rel=0.05)
    assert mixer.G.std() == pytest.approx(0.02, rel=0.05)
    assert mixer.U.std() == pytest.approx(0.01, rel=0.1)
    assert torch.equal(block.bypass.cross_layer_mix.weight, 0.5 * torch.eye(256))
    assert not block.bypass.gains.any()
    assert not block.embedding_gain.any()
    assert block.projection.weight.abs().max() <= 1e-3 / 16
    assert block.feedforward.branches["mlp"].linears[-1].weight.abs().max() <= 0.02 / 512**0.5
    assert block.feedforward.branches["pkm"].values.weight.std() == pytest.approx(0.02, rel=0.05)


@torch.no_grad()
def test_a_tied_embedding_that_starts_small_expects_no_token_before_any_other():
    """Tied to the head, one of 1/√C expects the token that it has just read: √C · 1/√C · √C."""
    config = tiny_config(C=256, layers=1, tie_embedding_to_lm_head=True)
    tokens = torch.randint(1000, (1, 40))
    losses = {}
    for std in (None, 1e-4):
        torch.manual_seed(0)
        model = build_model(replace(config, embedding_std=std), 1000).eval()
        losses[std] = model.loss(tokens, tokens.roll(-1, 1))[0].item()
    assert model.embedding.weight.std() == pytest.approx(1e-4, rel=0.02)
    assert losses[1e-4] == pytest.approx(math.log(1000), abs=0.01)
    assert losses[None] > math.log(1000) + 1


@pytest.mark.parametrize("residuals", [False, True])
def test_stacked_mixers_are_their_formula(residuals):
    model = make(
        mixer_depth=2,
        mixer_depth_stabilizers=True,
        mixer_depth_residuals=residuals,
        per_scale_mixer_widths=None,
    )
    mixer = model.blocks[0].mixer
    (stacked,) = mixer.stacked
    bands = torch.randn(4, 1, 50, 16, dtype=torch.float64)
    X = mixer.rotate(bands)
    for level, scales in ((stacked, stacked.scales), (None, mixer.scales)):
        inputs = X
        if level is not None:
            centred = X - X.mean(-1, keepdim=True)
            normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            normal = normal * level.norm.weight[:, None, None] + level.norm.bias[:, None, None]
            inputs = level.input_gain.gain * normal
        Y = torch.stack(
            [
                (x @ m.W.T) * torch.nn.functional.silu(g @ m.G.T) + x @ m.V @ m.U.T
                for m, x, g in zip(
                    scales, inputs, torch.tensordot(mixer.routing, inputs, 1), strict=True
                )
            ]
        )
        if level is not None:
            Y = level.output_gain.gain * (Y + level.bias[:, None, None])
        X = X + Y if residuals else Y
    torch.testing.assert_close(mixer(bands), mixer.rotate(X), rtol=0, atol=1e-11)


def test_the_approximation_gates_the_details():
    gate = make(phase_gating=True).blocks[0].phase_gate
    bands = torch.randn(4, 2, 5, 16, dtype=torch.float64)
    gated = gate(bands)
    assert torch.equal(gated[0], bands[0])
    for s in range(1, 4):
        for b in range(2):
            for t in range(5):
                phase = gate.gains[s - 1] * (gate.proj.weight @ bands[0, b, t])
                expected = bands[s, b, t] * 2 / (1 + (-phase).exp())
                torch.testing.assert_close(gated[s, b, t], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("switch", [{"phase_gating": True}, {"lifting_data_dependent": 3}], ids=str)
def test_a_new_model_is_the_same_with_or_without(switch):
    """They start as the identity and as zero, and learn from the first step on."""
    torch.manual_seed(0)
    plain = build_model(tiny_config(), V).double().eval()
    model = build_model(tiny_config(**switch), V).double().eval()
    names = {name.replace(".net.", "."): name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, p in plain.named_parameters():
            model.get_parameter(names.pop(name)).copy_(p)
    assert names  # what the switch has added
    torch.testing.assert_close(model(tokens())[0], plain(tokens())[0], rtol=0, atol=1e-12)
    model.loss(tokens(), tokens())[0].backward()
    zeros = [name for name in names.values() if not model.get_parameter(name).any()]
    assert zeros
    for name in zeros:
        assert model.get_parameter(name).grad.any(), name


def test_only_the_largest_coefficients_are_read():
    select = LargestCoefficients(3)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    x[0, 0] = torch.tensor([4, -4, 1, 4, -4, 0, 4, 2.0])  # a tie: no way to choose three of five
    for row, kept in zip(x.flatten(0, 1), select(x).flatten(0, 1), strict=True):
        third = sorted(map(abs, row.tolist()))[-3]
        assert kept.tolist() == [v if abs(v) >= third else 0.0 for v in row.tolist()]
    assert torch.equal(LargestCoefficients(8)(x), x)


def test_the_gradient_goes_straight_through_the_choice():
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    kept = LargestCoefficients(3)(x)
    kept.sin().sum().backward()
    assert torch.equal(x.grad, kept.detach().cos())


def test_largest_coefficients_are_those_of_the_rotated_signal():
    """Signals and gates read them, and the weights are not rotated instead."""
    switches = {"per_scale_mixer_widths": (1, 1, 1, 1), "low_rank": 0}
    mixer = make(**switches, hadamard_top_k=3).blocks[0].mixer
    whole = make(**switches).blocks[0].mixer  # perturbed alike: the same weights
    bands = torch.randn(4, 2, 64, 16, dtype=torch.float64)
    assert bands[..., 0].numel() > mixer.n_weight_rows
    X = bands @ hadamard_transform(torch.eye(16, dtype=torch.float64))
    kept = torch.where(X.abs() >= X.abs().sort().values[..., -3:-2], X, 0)
    assert (kept.count_nonzero(-1) == 3).all()
    torch.testing.assert_close(mixer(bands), whole(whole.rotate(kept)), rtol=0, atol=1e-12)
    assert (mixer(bands) - whole(bands)).abs().max() > 0.1


@torch.no_grad()
def test_stable_initial_values():
    C, model = 64, build_model(tiny_config(C=64, stable_parametrization=True), 1000)
    idx = torch.arange(50)[None]
    plain = build_model(tiny_config(C=64), 1000)
    plain.load_state_dict(model.state_dict())
    seen = []
    for m in (model, plain):
        m.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
        m(idx)
    torch.testing.assert_close(seen[0], 8 * seen[1])
    block = model.blocks[0]
    W = block.mixer.scales[0].W
    assert torch.linalg.matrix_norm(W, 2) == pytest.approx(1, abs=1e-5)
    off_diagonal = W[~torch.eye(C, dtype=torch.bool)]
    assert off_diagonal.std() == pytest.approx(1e-3 / 8, rel=0.1)
    bound = 1 / C**0.5  # of torch's default
    assert block.projection.weight.abs().max() == pytest.approx(bound / (C * 2) ** 0.5, rel=0.05)
    last = block.feedforward.branches["mlp"].linears[-1].weight
    assert last.abs().max() == pytest.approx(1 / (2 * C), rel=0.05)


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_is_cross_entropy(variant):
    model = make(**VARIANTS[variant])
    idx = tokens()
    logits, _ = model(idx[:, :-1])
    expected = cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none")
    losses = model.token_losses(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(losses.flatten(), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.loss(idx[:, :-1], idx[:, 1:])[0], expected.mean())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    """All but unread memory rows, and the first block's mix of a mean that does not exist."""
    model = make(**VARIANTS[variant]).train()
    idx = tokens(4)
    model.loss(idx[:, :-1], idx[:, 1:])[0].backward()
    for name, p in model.named_parameters():
        if name.endswith("blocks.0.bypass.cross_layer_mix.weight") and not p.requires_grad:
            assert "loop" not in variant and "passes" not in variant
            continue
        if name.endswith("W.noise"):
            assert not p.requires_grad
            continue
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.any(), name
        # Padding leaves some columns unread, and a memory some rows.
        if not name.endswith(("values.weight", "keys_a.weight", "keys_b.weight")):
            assert p.grad.count_nonzero() >= p.numel() / 2, name


def test_checkpointing_changes_no_gradient():
    gradients = []
    for gradient_checkpointing in (False, True):
        model = make(gradient_checkpointing=gradient_checkpointing, dropout_mixer=0.3).train()
        torch.manual_seed(1)
        model.loss(tokens(), tokens())[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)


def test_training_averages_the_losses_of_all_passes():
    places = ("embedding", "mixer", "projection", "mlp", "lm_head")
    dropouts = {f"dropout_{place}": 0.0 for place in places}
    twice = make(loop_iterations=2, **dropouts)
    once = make()
    once.load_state_dict(twice.state_dict())
    idx = tokens()
    first, second = once.loss(idx, idx)[0], twice.loss(idx, idx)[0]
    assert abs(first - second) > 1e-3
    torch.testing.assert_close(twice.train().loss(idx, idx)[0], (first + second) / 2)


def test_stochastic_depth_skips_later_blocks_more_often():
    model = make(stochastic_depth_rate=0.9, layers=3, dropout_embedding=0.0).train()
    x, y = torch.zeros(1), torch.ones(1)
    kept = [sum(float(model._drop(x, y, i)) for _ in range(500)) / 500 for i in range(3)]
    assert kept == pytest.approx([1.0, 0.7, 0.4], abs=0.08)
    model.eval()
    assert model._drop(x, y, 2) is y


def test_dropout_is_on_in_training_only():
    model = make(dropout_mixer=0.5, dropout_mlp=0.5)
    idx = tokens()
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_loss_and_gradients_are_the_same(backend):
    idx = tokens()
    gradients = []
    for compiled in (False, True):
        model = make(torch.float32)
        loss = torch.compile(model.loss, backend=backend) if compiled else model.loss
        loss(idx[:, :-1], idx[:, 1:])[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_inductor_loss_and_gradients_are_the_same():
    test_compiled_loss_and_gradients_are_the_same("inductor")
