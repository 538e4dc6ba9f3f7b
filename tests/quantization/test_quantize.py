"""Quantized models: which weights have how many bits, and that they read like any other model."""

import re
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import perturb, tiny_config
from tests.fusion.test_fuse import sharpened
from tests.models.test_properties import T, V, configs
from wavelet_lm import Config, build_model
from wavelet_lm.fusion.fuse import COMPONENTS, fuse, weight_bytes_per_token
from wavelet_lm.fusion.linear import BatchedLinear
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import sampled_tokens
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.inference.strategies.speculative import Counts, speculative_tokens
from wavelet_lm.models.wavelet_lm.memory import SubKeys, ValueTable
from wavelet_lm.quantization.quantize import _input_moments, quantize, scheme_component
from wavelet_lm.quantization.scheme import Scheme
from wavelet_lm.quantization.weights import (
    QuantizedEmbedding,
    QuantizedSubKeys,
    QuantizedValueTable,
    QuantizedWeight,
)

RANDOM = {"max_examples": 15, "suppress_health_check": list(HealthCheck), "derandomize": True}
GREEDY = SamplingOptions(temperature=0)
FLOAT = (nn.Linear, nn.Embedding, BatchedLinear, SubKeys, ValueTable)
MIXED = {
    "mixer_coarse": 8,
    "mixer_mid": 4,
    "mixer_fine": 2,
    "mlp": 4,
    "lifting": 16,
    "embedding": 8,
    "rest": 2,
}


def scheme(bits=8, calibrated=False, **others):
    values = {name: others.get(name, bits) for name in COMPONENTS}
    return Scheme(bits=values, group_size=32, calibrated=calibrated)


def tokens(B=2, n=T, seed=1):
    return torch.randint(V, (B, n), generator=torch.Generator().manual_seed(seed))


SCHEMES = {
    "8": scheme(),
    "4 calibrated": scheme(4, calibrated=True),
    "2": scheme(2),
    "mixed": scheme(**MIXED),
    "mixed calibrated": scheme(**MIXED, calibrated=True),
}
schemes = st.sampled_from(sorted(SCHEMES)).map(SCHEMES.get)


def quantized(model, scheme, **options):
    calibration = tokens(B=3, seed=2) if scheme.calibrated else None
    return quantize(model, scheme, calibration=calibration, **options)


def weights(quantized_model):
    """Bits by name of everything that is quantized, and 16 of every other matrix or table."""
    found = {}
    for name, module in quantized_model.named_modules():
        if isinstance(module, FLOAT):
            found[name] = 16
        elif isinstance(getattr(module, "weight", None), QuantizedWeight):
            found[name] = module.weight.bits
    return found


@settings(**RANDOM)
@given(configs(), schemes)
def test_every_matrix_and_table_has_the_bits_that_were_asked_for(config, scheme):
    model = sharpened(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapt = config.fwpkm_inference_updates
    quantized_model = quantized(model, scheme, adapt=adapt)
    fused = fuse(model, adapt=adapt, precision=scheme.precision)
    named = {n: m for n, m in fused.named_modules() if isinstance(m, FLOAT)}
    expected = {name: scheme.bits[scheme_component(fused, name)] for name in named}
    assert weights(quantized_model) == expected
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert not set(model.modules()) & set(quantized_model.modules())
    shared = {}
    for name, module in named.items():
        new = quantized_model.get_submodule(name)
        weight = new.weight
        if isinstance(weight, QuantizedWeight):
            # Weights that are one in the model are one in the quantized model.
            assert shared.setdefault(id(module.weight), weight) is weight
            plain = module.weight.view(weight.dequantized().shape)
            if not scheme.calibrated:
                steps = weight.scales.double().amax(-1, keepdim=True)
                error = (weight.dequantized(torch.float64) - plain).abs()
                assert (error <= 0.5001 * steps).all()
        else:
            assert torch.equal(weight, module.weight)


# --- components, written down by hand ------------------------------------------------------------


def test_components_of_a_headline_model():
    """Scales 0 to 2 are coarse, 3 to 5 mid, from 6 on fine; widths are apart from one another."""
    widths = (1, 1, 1, 1, 0.5, 0.5, 0.5)
    config = tiny_config(C=32, levels=6, per_scale_mixer_widths=widths, shared_lifting_weights=True)
    distinct = dict(zip(COMPONENTS, (8, 4, 2, 4, 8, 2, 16), strict=True))
    quantized_model = quantize(perturb(build_model(config, V)).eval(), scheme(**distinct))
    places = {
        r"embedding": "embedding",
        r"head": "rest",
        r"blocks\.\d\.mixer\.scales\.groups\.0\.(value|gate|low_rank)": "mixer_coarse",
        r"blocks\.\d\.mixer\.scales\.groups\.1\.(value|gate|low_rank)": "mixer_mid",
        r"blocks\.\d\.mixer\.scales\.groups\.2\.(value|gate|low_rank|down|up)": "mixer_mid",
        r"blocks\.\d\.mixer\.scales\.groups\.3\.(value|gate|low_rank|down|up)": "mixer_fine",
        r"(blocks\.0\.reconstruction\.updates|wavelets\.0)\..*": "lifting",
        r"blocks\.\d\.reconstruction\.projection": "rest",
        r"blocks\.\d\.feedforward\.(first\.0|mlp\.\d)": "mlp",
        r"blocks\.\d\.feedforward\.(first\.1|memories\.\d\..*)": "rest",
        r"blocks\.\d\.bypass\.cross_layer_mix": "rest",
    }
    found = weights(quantized_model)
    for name, bits in found.items():
        (which,) = (c for pattern, c in places.items() if re.fullmatch(pattern, name))
        assert bits == distinct[which], name
    for pattern in places:
        assert any(re.fullmatch(pattern, name) for name in found), pattern
    scales = quantized_model.blocks[0].mixer.scales.scales
    assert scales == [[0, 1, 2], [3], [4, 5], [6]]


def test_components_of_the_other_networks():
    gpt = Config(model="gpt", C=16, layers=1, heads=2, block_size=32, head_hidden=8)
    found = weights(quantize(build_model(gpt, V).eval(), scheme(embedding=4, mlp=2)))
    assert {n for n, bits in found.items() if bits == 4} == {"embedding", "position_embedding"}
    assert {n for n, bits in found.items() if bits == 2} == {
        "blocks.0.mlp.expand",
        "blocks.0.mlp.contract",
    }
    assert {"head", "dense.0", "blocks.0.attention.projection"} < set(found)
    cells = tiny_config(multinodal_enabled=True, multinodal_num_cells=2, multinodal_cell_dim=8)
    model = build_model(cells, V).eval()
    found = weights(quantize(model, scheme(16, lifting=8, mixer_coarse=4, mlp=2)))
    for cell in ("cells.0", "cells.1"):
        mine = {n: bits for n, bits in found.items() if n.startswith(cell)}
        assert {mine[n] for n in mine if "wavelets" in n or "updates" in n} == {8}
        assert {mine[n] for n in mine if ".mlp." in n} == {2}
        assert {mine[n] for n in mine if ".groups." in n} == {4, 16}
    learning = tiny_config(fwpkm_inference_updates=True)
    found = weights(quantize(build_model(learning, V).eval(), scheme(mlp=4), adapt=True))
    assert sum(bits == 4 for bits in found.values()) == 2 * learning.layers
    assert all("branches.mlp" in n for n, bits in found.items() if bits == 4)


@pytest.mark.parametrize("embedding", [16, 8, 4])
@pytest.mark.parametrize("model", ["wavelet_lm", "gpt"])
@pytest.mark.parametrize("rest", [16, 8, 4])
def test_a_head_tied_to_the_embedding_is_of_its_component(model, embedding, rest):
    """One matrix in the model is one in the quantized one, whatever the bits of the others."""
    tied = {"tie_embedding_to_lm_head": True}
    config = tiny_config(**tied)
    if model == "gpt":
        config = Config(model="gpt", C=16, layers=1, heads=2, block_size=32, head_hidden=0, **tied)
    built = perturb(build_model(config, V)).eval()
    plain = scheme(rest, embedding=embedding)
    for wanted in (plain, scheme(rest, embedding=embedding, calibrated=True)):
        quantized_model = quantized(built, wanted)
        found = weights(quantized_model)
        assert found["head"] == found["embedding"] == embedding
        assert quantized_model.head.weight is quantized_model.embedding.weight
        if embedding < 16:  # what is read as a table is rounded to what is nearest
            codes = quantized(built, plain).head.weight.codes
            assert torch.equal(quantized_model.head.weight.codes, codes)


def test_blocks_that_share_a_wavelet_share_its_codes():
    model = build_model(tiny_config(shared_lifting_weights=True), V).eval()
    quantized_model = quantize(model, scheme(4, calibrated=True), calibration=tokens())
    first, second = (block.reconstruction.updates for block in quantized_model.blocks)
    assert first is second
    assert quantized_model.wavelets[0].update[0][-1].batch is first.last


# --- calibration ---------------------------------------------------------------------------------


def test_calibration_brings_the_logits_closer_and_names_its_stages():
    torch.manual_seed(0)
    config = tiny_config(C=32, pkm_enabled=False, fwpkm_enabled=False)
    model = sharpened(config)
    text = torch.randint(V, (40, 32))
    exact = whole(model, tokens(8))

    def error(quantized_model):
        return float((whole(quantized_model, tokens(8)) - exact).square().mean())

    stages = []
    wanted = scheme(2, calibrated=True)
    calibrated = quantize(model, wanted, calibration=text, progress=stages.append)
    assert stages == ["lifting", "blocks.0", "blocks.1", "head"]
    assert error(calibrated) < 0.8 * error(quantize(model, scheme(2)))


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("model", [{}, {"multinodal_enabled": True, "multinodal_num_cells": 2}])
def test_every_matrix_that_a_text_reaches_is_compensated(model, adapt):
    """All but the mix over layers of the first block, which has none before it."""
    model = sharpened(tiny_config(C=32, **model))
    text = torch.randint(V, (8, 32))
    calibrated = quantize(model, scheme(2, calibrated=True), calibration=text, adapt=adapt)
    plain = quantize(model, scheme(2), adapt=adapt)
    for name in weights(plain):
        codes = [
            quantized_model.get_submodule(name).weight.codes
            for quantized_model in (calibrated, plain)
        ]
        is_table = isinstance(plain.get_submodule(name), (QuantizedEmbedding, QuantizedValueTable))
        is_keys = isinstance(plain.get_submodule(name), QuantizedSubKeys)
        unread = name.endswith("blocks.0.bypass.cross_layer_mix")
        assert torch.equal(*codes) == (is_table or is_keys or unread), name


def test_matrices_are_compensated_on_all_that_they_read(monkeypatch):
    """The nets of a lifting read what comes in and what has been mixed."""
    quantized_model = fuse(sharpened(tiny_config()))
    name = "blocks.0.reconstruction.updates.last"
    batch = quantized_model.get_submodule(name)
    n, _, K = batch.weight.shape
    expected, ways = torch.zeros(n, K, K, dtype=torch.float64), set()

    def add(way, at, x):
        rows = x.reshape(len(expected[at]), -1, K)
        expected[at] += rows.mT @ rows
        ways.add(way)

    forward, one = BatchedLinear.forward, BatchedLinear.one

    def of_all(self, x):
        if self is batch:
            add("all", slice(None), x)
        return forward(self, x)

    def of_one(self, i, x):
        if self is batch:
            add("one", slice(i, i + 1), x)
        return one(self, i, x)

    monkeypatch.setattr(BatchedLinear, "forward", of_all)
    monkeypatch.setattr(BatchedLinear, "one", of_one)
    moments = _input_moments(quantized_model, [name], tokens(19))
    assert ways == {"all", "one"}
    torch.testing.assert_close(moments[name].blocks[0].double(), expected, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in quantized_model.modules())


# --- reading -------------------------------------------------------------------------------------


def whole(quantized_model, idx):
    with torch.no_grad():
        return quantized_model(idx)[0]


@settings(**RANDOM)
@given(configs(), schemes, st.integers(1, T - 1))
def test_any_chunks_and_any_batch_give_the_same_logits(config, scheme, cut):
    config = config.replace(fwpkm_inference_updates=False)
    quantized_model = quantized(sharpened(config), scheme)
    idx = tokens()
    expected = whole(quantized_model, idx)
    assert expected.dtype == torch.float64
    losses = quantized_model.token_losses(idx[:, :-1], idx[:, 1:])
    nats = -expected[:, :-1].log_softmax(-1).gather(-1, idx[:, 1:, None])[..., 0]
    torch.testing.assert_close(losses.double(), nats, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        first, state = quantized_model(idx[:, :cut])
        rest, _ = quantized_model(idx[:, cut:], state)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.cat((first, rest), 1), expected, **close)
    torch.testing.assert_close(whole(quantized_model, idx[1:]), expected[1:], **close)
    logits, state = Decoder(quantized_model).prefill([row[:cut].tolist() for row in idx])
    torch.testing.assert_close(logits, expected[:, cut - 1], **close)
    session = Decoder(quantized_model).start(state, max_step=2)
    for t in range(cut, T):
        read = session.decode(idx[:, t : t + 1])
        torch.testing.assert_close(read[:, 0], expected[:, t], **close)


@settings(**{**RANDOM, "max_examples": 15})
@given(configs())
def test_eight_bits_leave_the_logits_nearly_as_they_were(config):
    # A choice of keys, or of channels, can turn with the slightest change of a score, and so can a
    # key of two numbers that is made as long as any other, or four channels that a norm spreads.
    config = config.replace(
        C=16,
        multinodal_cell_dim=16,
        pkm_enabled=False,
        fwpkm_enabled=False,
        fwpkm_inference_updates=False,
        hadamard_top_k=0,
        delta_key_dim=16,
    )
    model = sharpened(config)
    exact, found = whole(model, tokens()), whole(quantize(model, scheme()), tokens())
    near = 0.1 if config.delta_memory else 0.05  # what it recalls is normed, however little it is
    assert (found - exact).norm() <= near * exact.norm()
    assert not torch.equal(found, exact)


def greedy_text(decoder, prompt, n):
    steps = sampled_tokens(decoder, *decoder.prefill([prompt]), [prompt], GREEDY, [1])
    return [drawn.token for (drawn,) in islice(steps, n)]


def pointed(dtype, **config):
    """A model whose logits are far enough apart to tell texts from one another."""
    torch.manual_seed(3)
    model = perturb(build_model(tiny_config(**config), V)).to(dtype).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_greedy_text_is_that_of_whole_texts_read_anew(name):
    quantized_model = quantized(pointed(torch.float64), SCHEMES[name])
    text = [1, 2, 3]
    for _ in range(12):
        text.append(int(whole(quantized_model, torch.tensor([text]))[0, -1].argmax()))
    assert greedy_text(Decoder(quantized_model), [1, 2, 3], 12) == text[3:]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_for_cpus_changes_logits_by_rounding_alone(bits, dtype):
    # The choice of a memory's rows can turn with the slightest change of a score.
    model = pointed(torch.float32, C=64, pkm_enabled=False, fwpkm_enabled=False)
    quantized_model = quantize(model, scheme(bits), dtype=dtype)
    text = tokens(1, 20)[0].tolist()
    exact = whole(quantize(model.double(), scheme(bits)), torch.tensor([text]))[:, -1]
    before = {name: p.clone() for name, p in quantized_model.named_parameters()}
    decoder = Decoder(quantized_model)
    turned = [m for m in decoder.model.modules() if getattr(m, "in_cpu_layout", False)]
    assert bool(turned) == (bits == 4)
    logits, _ = decoder.prefill([text])
    assert (logits - exact).abs().max() <= 0.1 * (exact.max() - exact.min())
    for name, p in quantized_model.named_parameters():  # the model itself can still be saved
        assert torch.equal(p, before[name])
    again, _ = Decoder(quantized_model).prefill([text])
    assert torch.equal(again, logits)


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_quantized_draft_changes_no_token(bits, dtype):
    model = pointed(dtype)
    target, draft = Decoder(model, adapt=False), Decoder(quantize(model, scheme(bits)), adapt=False)
    counts, prompt = Counts(), [4, 5]
    starts = target.prefill([prompt]), draft.prefill([prompt])
    drawn = speculative_tokens(target, draft, prompt, *starts, GREEDY, 1, 3, counts)
    found = [d.token for d in islice(drawn, 30)]
    assert found == greedy_text(target, prompt, 30)
    assert counts.accepted > 0


def test_fast_weights_of_quantized_tables_learn():
    learning = {"fwpkm_inference_updates": True, "fwpkm_chunk_size": 4, "fwpkm_update_lr": 30.0}
    model = pointed(torch.float64, **learning)
    quantized_model = quantize(model, scheme(), adapt=True)
    decoder = Decoder(quantized_model)
    reading = Decoder(quantize(model, scheme()), adapt=False)
    text = tokens(2, 15)
    sessions = [d.start(d.prefill(text[:, :3].tolist())[1]) for d in (decoder, reading)]
    alone = decoder.start(decoder.prefill([text[1, :3].tolist()])[1])
    for t in range(3, 15):
        learned, fixed = (session.decode(text[:, t : t + 1]) for session in sessions)
        one = alone.decode(text[1:, t : t + 1])
        torch.testing.assert_close(one[0], learned[1], rtol=1e-9, atol=1e-9)
    assert sessions[0].state()[0].memory.rows.shape[1] > 0
    assert not torch.allclose(learned, fixed)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_whole_step_is_one_graph_for_the_compiler(bits):
    """Traced by dynamo and run without a code generator."""
    config = tiny_config(layers=1, levels=2, C=32, per_scale_mixer_widths=None)
    quantized_model = quantize(perturb(build_model(config, V)).eval(), scheme(bits))
    eager, traced = Decoder(quantized_model), Decoder(quantized_model)
    traced.accelerate = lambda step, owners: torch.compile(step, fullgraph=True, backend="eager")
    assert greedy_text(traced, [1, 2, 3], 6) == greedy_text(eager, [1, 2, 3], 6)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_compiled_text_is_that_of_the_plain_decoder(bits):
    quantized_model = quantize(pointed(torch.float32, C=32), scheme(bits))
    compiled = greedy_text(Decoder(quantized_model, compile=True), [1, 2, 3], 12)
    assert compiled == greedy_text(Decoder(quantized_model), [1, 2, 3], 12)
    torch.compiler.reset()


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_captured_step_is_the_step(bits, compile):
    quantized_model = quantize(pointed(torch.float32, C=32).cuda(), scheme(bits))
    captured, plain = Decoder(quantized_model, compile=compile), Decoder(quantized_model)
    plain.accelerate = lambda step, owners: step
    assert greedy_text(captured, [1, 2, 3], 12) == greedy_text(plain, [1, 2, 3], 12)
    torch.compiler.reset()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bytes_read_per_token_are_as_few_as_their_bits(bits):
    """Scales and vectors come on top."""
    model = build_model(tiny_config(C=256, pkm_enabled=False, fwpkm_enabled=False), V).eval()
    read = weight_bytes_per_token(quantize(model, scheme(bits)))
    assert 1 < 32 / bits * read / weight_bytes_per_token(fuse(model)) < 1 + 0.7 / bits


@settings(**{**RANDOM, "max_examples": 8})
@given(configs(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_other_dtypes_compute_in_themselves(config, dtype):
    assume(not config.hadamard_top_k)
    adapt = config.fwpkm_inference_updates
    quantized_model = quantize(sharpened(config), scheme(), dtype=dtype, adapt=adapt)
    logits = whole(quantized_model, tokens())
    assert logits.dtype == dtype
    assert logits.isfinite().all()
