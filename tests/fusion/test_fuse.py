"""Fused models compute what the model does, for every switch, in any chunks and dtype."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import perturb, tiny_config
from tests.models.test_properties import T, V, configs
from wavelet_lm import Config, build_model
from wavelet_lm.fusion import linear as products
from wavelet_lm.fusion.fuse import fuse, n_bytes, weight_bytes_per_token
from wavelet_lm.fusion.linear import BatchedLinear
from wavelet_lm.models.cost import breakdown
from wavelet_lm.models.wavelet_lm.memory import SubKeys, ValueTable
from wavelet_lm.roles import uses

ROOT = Path(__file__).parents[2]

RANDOM = {"max_examples": 50, "suppress_health_check": list(HealthCheck), "derandomize": True}


def sharpened(config):
    """A perturbed model in float64 and eval mode."""
    torch.manual_seed(0)
    return perturb(build_model(config, V)).double().eval()


@settings(**RANDOM)
@given(configs(), st.sampled_from([lambda component: None, lambda component: component]))
def test_the_fused_model_is_the_same_function(config, precision):
    """Whether its components are fused or stay apart."""
    model = sharpened(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    fused = fuse(model, adapt=config.fwpkm_inference_updates, precision=precision)
    idx = torch.randint(V, (2, T))
    with torch.no_grad():
        expected, _ = model(idx)
        whole, _ = fused(idx)
        first, state = fused(idx[:, :7])
        rest, _ = fused(idx[:, 7:], state)
    torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat((first, rest), 1), expected, rtol=1e-9, atol=1e-9)
    assert not set(model.modules()) & set(fused.modules())  # else their modes would be one
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad or "cross_layer_mix" in name or "noise" in name


def test_bytes_read_per_token_of_the_headline_config():
    """Close to the breakdown's count of reads, which knows of no fusion."""
    config = Config.from_json(ROOT / "config.json")
    with torch.device("meta"):
        model = build_model(config, 50257)
    fused = fuse(model, torch.bfloat16)
    read = breakdown(config, 50257).total.read
    # A memory's query and keys, C² + √N · C each, have become 2 √N · C.
    n_keys = 128
    saved = 4 * (2048 * 2048 + n_keys * 2048 - 2 * n_keys * 2048)
    side_by_side = 2 * 2048 * 2048  # the projection, of a rotated and of a plain signal
    expected = read - saved + side_by_side
    assert weight_bytes_per_token(fused) / 2 == pytest.approx(expected, rel=1e-4)


@settings(**{**RANDOM, "max_examples": 15})
@given(configs())
def test_bytes_read_per_token_are_at_most_all_of_them_as_often_as_they_run(config):
    config = config.replace(fwpkm_inference_updates=False)
    fused = fuse(sharpened(config))
    runs = config.loop_iterations * (config.looped_blocks_count if config.looped_blocks else 1)
    runs *= 2 * config.layers  # a shared wavelet runs once per block, its update nets twice
    assert 0 < weight_bytes_per_token(fused) <= runs * n_bytes(fused)


MATRICES_AND_TABLES = (nn.Linear, BatchedLinear, nn.Embedding, SubKeys, ValueTable)


class MatrixReads(TorchDispatchMode):
    """Counts the bytes of these weights that the products of a step are given, one by one."""

    def __init__(self, weights):
        super().__init__()
        self.ours = {weight.untyped_storage().data_ptr() for weight in weights}
        self.n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(a.alias_info is not None for a in function._schema.arguments)
        for x in [] if is_view else tree_leaves(args):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self.ours:
                n_read = x.numel()
                if "embedding" in str(function):
                    n_read = args[1].numel() * x.shape[-1]
                self.n_bytes += n_read * x.element_size()
        return function(*args, **(kwargs or {}))


@settings(**{**RANDOM, "max_examples": 15})
@given(configs())
def test_bytes_read_per_token_are_those_of_the_products_of_a_step(config):
    """Matrices and tables, as an onlooker of the operators counts them."""
    fused = fuse(sharpened(config.replace(fwpkm_inference_updates=False)))
    weights = {m.weight for m in fused.modules() if isinstance(m, MATRICES_AND_TABLES)}
    with torch.no_grad():
        _, state = fused(torch.randint(V, (1, 3)))
        with MatrixReads(weights) as seen:
            fused(torch.randint(V, (1, 1)), state)
    others = [u for u in uses(fused) if u.parameter is not None and u.parameter not in weights]
    said = weight_bytes_per_token(fused) - sum(8 * u.n_read * u.runs.reads for u in others)
    assert seen.n_bytes == said


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"mixer_transform": "identity", "wavelet_decomp_norm": True, "wavelet_recon_norm": True},
        {"tie_embedding_to_lm_head": True, "skip_proj_out": True, "lifting_linear_only": True},
        {"delta_memory": True, "delta_bands": 2},
        {"delta_memory": True, "delta_after_mixing": True},
        {"delta_memory": True, "delta_activation": "identity"},
        {"delta_memory": True, "delta_activation": "square", "delta_key_dim": 4},
        {"mlp_activation": "relu2"},
    ],
)
def test_logits_in_bfloat16_agree_within_rounding(switches):
    torch.manual_seed(0)
    model = perturb(build_model(tiny_config(**switches, pkm_enabled=False, fwpkm_enabled=False), V))
    idx = torch.randint(V, (2, T))
    with torch.no_grad():
        exact, _ = model.double().eval()(idx)
        found, _ = fuse(model, torch.bfloat16)(idx)
        plain, _ = model.bfloat16()(idx)
    error = lambda logits: float((logits.double() - exact).abs().max())  # noqa: E731
    assert found.dtype == torch.bfloat16
    assert error(found) <= max(1.5 * error(plain), 0.02 * float(exact.max() - exact.min()))


def test_a_tied_head_stays_the_embedding():
    fused = fuse(build_model(tiny_config(tie_embedding_to_lm_head=True), V), torch.bfloat16)
    assert fused.head.weight is fused.embedding.weight


def test_what_needs_no_change_is_shared():
    model = build_model(tiny_config(), V)
    fused = fuse(model)
    assert fused.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
    values = [m.feedforward.branches["pkm"].values.weight for m in model.blocks]
    assert {p.data_ptr() for p in values} < {p.data_ptr() for p in fused.parameters()}


def test_a_bias_apart_is_the_same_sum(monkeypatch):
    """As it is compiled for one text on a GPU."""
    model = sharpened(tiny_config())
    fused, idx = fuse(model), torch.randint(V, (1, T))
    with torch.no_grad():
        expected, _ = fused(idx)
        asked = []
        monkeypatch.setattr(products, "bias_apart", lambda x: asked.append(x) or True)
        apart, _ = fused(idx)
    assert len(asked) > 10
    torch.testing.assert_close(apart, expected, rtol=1e-9, atol=1e-9)
