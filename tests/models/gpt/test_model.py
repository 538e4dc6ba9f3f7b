"""GPT and WaveletGPT: their structure, both faces, training, and what they refuse."""

import json
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import perturb, tiny_config
from wavelet_lm import Config, ConfigError, UserError, build_model
from wavelet_lm.cli.count import main as count
from wavelet_lm.models.checkpoint import load_own_model, save_checkpoint
from wavelet_lm.models.cost import Cost, breakdown, table
from wavelet_lm.models.registry import n_params

V = 13
KINDS = ("gpt", "haar", "learnable", "ema")


def gpt_config(kind="gpt", **overrides):
    """A tiny GPT, or a WaveletGPT of this kind."""
    names = {"model": "gpt"} if kind == "gpt" else {"model": "wavelet_gpt", "wavelet_module": kind}
    sizes = {"layers": 3, "heads": 4, "head_hidden": 24, "block_size": 32}
    return tiny_config(**{**names, **sizes, **overrides})


def random_gpt(kind="gpt", **overrides):
    return perturb(build_model(gpt_config(kind, **overrides), V)).double().eval()


def tokens(B, T):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(T))


# --- the network ---------------------------------------------------------------------------------


def test_it_is_the_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = random_gpt(head_hidden=0, tie_embedding_to_lm_head=True)
    config = transformers.GPT2Config(
        vocab_size=V,
        n_positions=32,
        n_embd=16,
        n_layer=3,
        n_head=4,
        activation_function="gelu",
        bos_token_id=0,
        eos_token_id=0,
    )
    other = transformers.GPT2LMHeadModel(config).double().eval()
    names = {
        "wte": "embedding",
        "wpe": "position_embedding",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "ln_f": "final_norm",
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.projection",
        "mlp.c_fc": "mlp.expand",
        "mlp.c_proj": "mlp.contract",
        "h.": "blocks.",
    }
    ours = dict(model.named_parameters())
    assert len(ours) == len(dict(other.transformer.named_parameters()))
    with torch.no_grad():
        for name, p in other.transformer.named_parameters():
            transposed = ".c_" in name and p.ndim == 2  # its Conv1D keeps [in, out]
            for theirs, mine in names.items():
                name = name.replace(theirs, mine)
            p.copy_(ours[name].T if transposed else ours[name])
        idx = tokens(2, 32)
        torch.testing.assert_close(model(idx)[0], other(idx).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_that_of_the_formula(kind):
    c = gpt_config(kind)
    C, H, E = c.C, c.head_hidden, c.gpt_mlp_expansion
    expected = (V + c.block_size) * C
    expected += c.layers * (4 * C * C + 4 * C + E * (2 * C * C + C) + C + 4 * C) + 2 * C
    expected += (C + 1) * H + H * V
    if kind == "learnable":
        expected += (c.layers - 1) * sum(2 ** (1 + 5 * i // 8) for i in range(8))
    assert n_params(build_model(c, V)) == expected


def test_it_starts_as_gpt2_does():
    c = gpt_config(C=128, layers=8, head_hidden=0)
    model = build_model(c, 500).requires_grad_(False)
    assert model.embedding.weight.std() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].attention.qkv.weight.std() == pytest.approx(0.02, rel=0.05)
    for last in (model.blocks[3].attention.projection, model.blocks[3].mlp.contract):
        assert last.weight.std() == pytest.approx(0.02 / 4, rel=0.05)
        assert not last.bias.any()
    loss, _ = model.loss(torch.randint(500, (4, 32)), torch.randint(500, (4, 32)))
    assert float(loss) == pytest.approx(math.log(500), abs=0.1)


def test_the_averages_stand_between_the_blocks():
    model = random_gpt("haar")
    assert [block.average is not None for block in model.blocks] == [True, True, False]
    plain = random_gpt("gpt")
    plain.load_state_dict(model.state_dict())
    idx = tokens(1, 32)
    assert (plain(idx)[0][:, 0] - model(idx)[0][:, 0]).abs().max() > 1e-3
    for block in model.blocks:
        block.average = None
    torch.testing.assert_close(plain(idx)[0], model(idx)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_changes_nothing_bit_for_bit(kind):
    model = random_gpt(kind).float()
    idx = tokens(2, 32)
    other = idx.clone()
    other[:, 20:] = (other[:, 20:] + 1) % V
    assert torch.equal(model(idx)[0][:, :20], model(other)[0][:, :20])


@pytest.mark.parametrize("kind", [*KINDS, "db2"])
@settings(max_examples=15)
@given(cuts=st.lists(st.integers(1, 31), max_size=4, unique=True))
def test_chunks_say_what_the_whole_says(kind, cuts):
    model = random_gpt(kind)
    idx = tokens(2, 32)
    expected, end = model(idx)
    state, parts = None, []
    for part in idx.tensor_split(sorted(cuts), dim=1):
        logits, state = model(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(tree_leaves(state), tree_leaves(end), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for switch in (False, True):
        torch.manual_seed(0)
        model = random_gpt("learnable", gradient_checkpointing=switch).train()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        model.loss(tokens(2, 16), tokens(2, 16))[0].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind):
    drops = ("embedding", "projection", "mlp", "lm_head")
    model = build_model(gpt_config(kind, **{f"dropout_{drop}": 0 for drop in drops}), V)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = tokens(4, 17)
    losses = []
    for _ in range(30):
        loss, _ = model.loss(text[:, :-1], text[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_a_checkpoint_gives_the_same_model(tmp_path):
    model = perturb(build_model(gpt_config("learnable"), V)).eval()
    save_checkpoint(tmp_path / "model.safetensors", model, {})
    again = load_own_model(tmp_path / "model.safetensors")
    assert torch.equal(model(tokens(1, 20))[0], again(tokens(1, 20))[0])


# --- counted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_breakdown_counts_what_the_model_does(kind, tied):
    head = {"tie_embedding_to_lm_head": True, "head_hidden": 0} if tied else {}
    config = gpt_config(kind, block_size=8, **head)
    result, model = breakdown(config, V), build_model(config, V)
    assert result.n_params == result.total.n_params == n_params(model)
    idx = tokens(2, 8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        # The loss itself hides its in-place product from the counter.
        passes, _ = model.passes(idx, None)
        linear(passes[0], model.output_weight()).square().sum().backward()
    averages = result.components.get("moving averages", Cost()).flops  # sums of products here
    assert counter.get_total_flops() == idx.numel() * (result.total.flops - averages)
    _, state = model.eval()(idx)
    leaves = [leaf for leaf in tree_leaves(state) if leaf is not None]
    assert 2 * result.state_elements == sum(leaf.numel() for leaf in leaves)  # of two texts
    assert "7 the stack" in table(result)


def test_the_command_prints_the_learnable_kernels(tmp_path, monkeypatch, capsys):
    file = tmp_path / "gpt.json"
    values = {"model": "wavelet_gpt", "wavelet_module": "learnable", "C": 128, "layers": 10}
    file.write_text(json.dumps({**values, "block_size": 512}))
    monkeypatch.setattr(sys, "argv", ["models", str(file), "--vocab_size", "27"])
    count()
    (line,) = [row for row in capsys.readouterr().out.splitlines() if "averages" in row]
    assert line.split()[2] == "64,404"


# --- mistakes ------------------------------------------------------------------------------------


def test_past_the_context_it_refuses_in_one_line():
    model = random_gpt()
    message = r"^a text of 33 tokens is too long for this GPT, which reads 32 \(its block_size\);"
    with pytest.raises(UserError, match=message + r".*--context recompute:32.*block_size$"):
        model(tokens(1, 33))
    _, state = model(tokens(1, 30))
    with pytest.raises(UserError, match=message):
        model(tokens(1, 3), state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads": 3}, r"heads is 3; C \(16\) must be divisible by it"),
        ({"multinodal_enabled": True}, r"multinodal_enabled belongs to model wavelet_lm .* false$"),
        ({"loop_iterations": 2}, r"loop_iterations belongs to model wavelet_lm .* to 1$"),
        ({"wavelet_module": "ema"}, r"wavelet_module is ema and model gpt has no moving averages"),
        ({"wavelet_fraction": 0}, r"wavelet_fraction is 0; it must be > 0"),
        ({"tie_embedding_to_lm_head": True}, r"head_hidden is 24; set head_hidden to 0"),
        ({"model": "gpt2"}, r"model is gpt2; it must be wavelet_lm \| gpt \| wavelet_gpt"),
    ],
)
def test_keys_at_odds_with_the_model_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        gpt_config(**values)


def test_shared_kernels_are_learnable_ones():
    with pytest.raises(ConfigError, match=r"wavelet_module is haar; use wavelet_module learnable"):
        gpt_config("haar", wavelet_shared_kernels=True)


def test_an_unknown_wavelet_is_refused_when_the_model_is_built():
    pytest.importorskip("pywt")
    with pytest.raises(UserError, match=r"wavelet_module is 'db99'; .* such as db"):
        build_model(gpt_config("db99"), V)


def test_keys_of_the_other_model_at_their_defaults_are_silent():
    assert Config(model="gpt", C=33, heads=3).pkm_enabled  # whose C would have to be even
