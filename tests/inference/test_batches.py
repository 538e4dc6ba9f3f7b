"""A text of a batch is the text alone: what holds in which precision, for batches of 1 to 64."""

import functools

import pytest
import torch

from tests.conftest import perturb, tiny_config
from wavelet_lm import build_model
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.inference.generation import sampled_tokens
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.quantization.quantize import quantize
from wavelet_lm.quantization.scheme import Scheme

V, BATCHES, STEPS = 300, (2, 3, 16, 17, 33, 64), 3
SIZES = {
    "wavelet_lm": {"C": 64, "levels": 2, "layers": 1, "per_scale_mixer_widths": None},
    "gpt": {"model": "gpt", "C": 64, "heads": 2, "block_size": 64, "layers": 1},
}


@functools.cache
def decoder(model, kind):
    config = tiny_config(**SIZES[model])
    torch.manual_seed(0)
    network = perturb(build_model(config, V)).eval()
    if not kind.startswith("int"):
        return Decoder(network, dtype=getattr(torch, kind))
    bits = {"quantize_enabled": True, "quantize_bits": int(kind[3:]), "quantize_group_size": 32}
    return Decoder(quantize(network, Scheme.of(config.replace(**bits), False)))


def read(decoder, prompts, following):
    """Logits after the prompts and after each of the tokens that follow: [STEPS + 1, B, V]."""
    logits, state = decoder.prefill(prompts)
    session, found = decoder.start(state), [logits]
    for tokens in following:
        found.append(session.decode(tokens[:, None])[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16", "float32"])
@pytest.mark.parametrize("model", SIZES)
def test_logits_of_a_row_do_not_depend_on_the_others(model, kind):
    """Bit for bit but in float32, where the prompt's are, and later ones within rounding."""
    prompts = [torch.randint(V, (3 + i % 18,)).tolist() for i in range(64)]
    following = torch.randint(V, (STEPS, 64))
    reader = decoder(model, kind)
    rows = range(64)
    alone = [read(reader, prompts[i : i + 1], following[:, i : i + 1]) for i in rows]
    alone = torch.cat(alone, 1)
    for B in BATCHES:
        found, expected = read(reader, prompts[:B], following[:, :B]), alone[:, :B]
        if kind == "float32":
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * alone.abs().max())
        else:
            assert torch.equal(found, expected), B


@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16", "float32"])
def test_sample_i_of_any_batch_is_the_run_with_its_seed(kind):
    """In float32 up to a draw that falls within rounding of a border, which none does here."""
    reader, prompt = decoder("wavelet_lm", kind), [5, 7, 11]
    options = SamplingOptions(temperature=0.9, top_p=0.95, repetition_penalty=1.1)

    def texts(first, n):
        logits, state = reader.prefill([prompt])
        logits, state = logits.expand(n, -1), reader.rows(state, [0] * n)
        seeds = range(first, first + n)
        steps = sampled_tokens(reader, logits, state, [prompt] * n, options, list(seeds))
        tokens = [[drawn.token for drawn in next(steps)] for _ in range(4)]
        return list(zip(*tokens, strict=True))

    alone = [texts(seed, 1)[0] for seed in range(64)]
    assert len(set(alone)) > 32
    for B in (4, 64):
        assert [text for first in range(0, 64, B) for text in texts(first, B)] == alone
