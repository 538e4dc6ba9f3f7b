"""The delta memory against its formulas, and what a model with one can do."""

import pytest
import torch
from torch.nn.functional import silu

from tests.conftest import perturb, tiny_config
from wavelet_lm.config import ConfigError
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.models.registry import build_model
from wavelet_lm.models.wavelet_lm.delta_memory import DeltaMemory

V, B, T = 11, 2, 9
CONFIG = tiny_config(
    C=12, delta_memory=True, delta_heads=2, delta_key_dim=3, delta_value_dim=5, delta_bands=2
)


def memory(**keys) -> DeltaMemory:
    torch.manual_seed(0)
    return perturb(DeltaMemory(CONFIG.replace(**keys)).double()).eval()


def inputs():
    g = torch.Generator().manual_seed(1)
    h = torch.randn(B, T, CONFIG.C, generator=g).double()
    shape = (CONFIG.n_scales, B, T, CONFIG.padded_channels)
    return h, list(torch.randn(*shape, generator=g).double())


def square(z):
    """x xᵀ of each row [heads, d], all of it: the same dot products of twice as many numbers."""
    return torch.einsum("hi,hj->hij", z, z).flatten(1)


ACTIVATIONS = {"silu": silu, "identity": torch.nn.Identity(), "square": square}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_computes_what_its_docstring_says(activation):
    activate = ACTIVATIONS[activation]
    m, (h, bands) = memory(delta_activation=activation), inputs()
    y, _ = m(h, bands)
    for b in range(B):
        S = torch.zeros(2, 9 if activation == "square" else 3, 5).double()
        for t in range(T):
            x = h[b, t]
            f = torch.cat((x, bands[-1][b, t], bands[-2][b, t]))
            q, k = (activate((w.weight @ f).view(2, 3)) for w in (m.query, m.key))
            q, k = (z / z.norm(dim=-1, keepdim=True) for z in (q, k))
            v = (m.value.weight @ x).view(2, 5)
            beta, alpha = (m.rates.weight @ x + m.rates.bias).sigmoid().split(2)
            answers = torch.empty(2, 5).double()
            for i in range(2):
                S[i] = alpha[i] * S[i]
                S[i] += torch.outer(k[i], beta[i] * (v[i] - S[i].T @ k[i]))
                answers[i] = S[i].T @ q[i]
            scale = (answers.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            normal = answers / scale * m.norm_weight
            out = m.out.weight @ (normal.flatten() * silu(m.gate.weight @ x))
            torch.testing.assert_close(y[b, t], out, rtol=0, atol=1e-10)


def test_heads_begin_with_the_horizons_of_the_config():
    def kept(**keys):
        m = DeltaMemory(CONFIG.replace(**keys))
        return m.rates.bias[m.heads :].sigmoid()

    torch.testing.assert_close(kept(), 1 - 1 / torch.tensor([4.0, 150.0]))
    odds = torch.tensor([99.0, 9.9, 0.99])  # of keeping, with equal factors between the heads
    decays = kept(delta_heads=3, delta_horizons=(100, 1.99))
    torch.testing.assert_close(decays, odds / (1 + odds))


def test_horizons_are_two_numbers():
    with pytest.raises(ConfigError, match=r"^delta_horizons is .*; it must be two numbers"):
        tiny_config(delta_memory=True, delta_horizons=(4, 9, 150))


@pytest.mark.parametrize(
    ("switches", "tolerance"),
    [
        ({"wavelet_mode": "haar"}, 1e-5),
        ({"lifting_linear_only": True}, 0.25),  # its nets begin near the identity, with noise
        ({"lifting_linear_only": True, "lifting_init": "zero"}, 1e-5),
    ],
)
def test_a_new_memory_recalls_what_followed_the_like(switches, tolerance):
    """Before any training its keys are the queries of one position before."""
    torch.manual_seed(0)
    model = build_model(CONFIG.replace(delta_bands=1, wavelet_crawl=False, **switches), V)
    m, wavelet = model.blocks[0].delta_memory, model.wavelets[0]
    h = torch.randn(B, T, CONFIG.C)
    bands, _ = wavelet.decompose(model.blocks[0].pad(h))
    q, k = m.queries_and_keys(torch.cat((h, bands[-1]), -1)).chunk(2, -1)
    torch.testing.assert_close(k[:, 1:], q[:, :-1], rtol=0, atol=tolerance * q.std().item())


def test_half_precision_keeps_a_wide_state():
    m = memory().bfloat16()
    h, bands = inputs()
    y, state = m(h.bfloat16(), [band.bfloat16() for band in bands])
    assert (y.dtype, state.dtype, state.shape) == (torch.bfloat16, torch.float32, (B, 2 * 3 * 5))


def test_more_details_than_there_are_is_one_line():
    with pytest.raises(ConfigError, match=r"^delta_bands is 4 and the wavelet has 3 details"):
        tiny_config(delta_memory=True, delta_bands=4, levels=3, per_scale_mixer_widths=None)
    tiny_config(delta_bands=4, levels=3, per_scale_mixer_widths=None)  # which nobody reads


@pytest.mark.parametrize("packets", [False, True])
def test_a_session_takes_back_what_the_memory_was_told(packets):
    config = CONFIG.replace(wavelet_packets=packets, per_scale_mixer_widths=None, levels=2)
    torch.manual_seed(0)
    model = perturb(build_model(config, V).double()).eval()
    decoder = Decoder(model)
    text = torch.randint(V, (20,)).tolist()
    _, state = decoder.prefill([text[:5], text[3:5]])
    session = decoder.start(state, max_step=4)
    session.decode(torch.tensor([text[5:9], text[5:9]]))
    session.rollback(3)
    session.decode(torch.tensor([[7, 8], [8, 7]]))
    session.rollback(2)
    logits = session.decode(torch.tensor([text[6:10], text[6:10]]))
    for row, start in ((0, 0), (1, 3)):
        whole, _ = model(torch.tensor([text[start:10]]))
        torch.testing.assert_close(logits[row], whole[0, -4:], rtol=0, atol=1e-9)
    again = decoder.start(session.state(), 1)
    one = again.decode(torch.tensor([[3], [3]]))
    whole, _ = model(torch.tensor([[*text[:10], 3]]))
    torch.testing.assert_close(one[0], whole[0, -1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("switches", [{}, {"gradient_checkpointing": True}])
def test_it_compiles_in_one_graph(switches):
    places = ("embedding", "mixer", "projection", "mlp", "lm_head")
    config = CONFIG.replace(**{f"dropout_{place}": 0.0 for place in places}, **switches)
    torch.manual_seed(0)
    model = perturb(build_model(config, V).double())
    tokens = torch.randint(V, (B, 40))
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")

    def results(loss):
        model.zero_grad()
        value, _ = loss(tokens, tokens.roll(1, 1))
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    for own, true in zip(results(compiled), results(model.loss), strict=True):
        torch.testing.assert_close(own, true, rtol=0, atol=1e-9)
    torch.compiler.reset()


def test_after_mixing_it_reads_what_the_scales_have_been_added_to():
    torch.manual_seed(0)
    model = perturb(build_model(CONFIG.replace(delta_after_mixing=True), V).double()).eval()
    block, wavelet = model.blocks[0], model.wavelets[0]
    x = torch.randn(B, T, CONFIG.C).double()
    found, mean, _ = block(x, x, None, wavelet)

    h = block.norm1(block.with_embedding(x, x))
    details, _ = wavelet.decompose(block.pad(h))
    mixed = block.mixed_signal([block.bypass(torch.stack(details), mean, None)], wavelet)
    stream = block.spectral_gain(block.with_embedding(x, x)) + mixed
    memory = block.delta_memory
    plain = DeltaMemory(CONFIG).double().eval()  # which reads what is normalised
    plain.load_state_dict({k: v for k, v in memory.state_dict().items() if "norm." not in k})
    normal = torch.nn.functional.layer_norm(stream, (CONFIG.C,), *memory.norm.parameters())
    stream = stream + plain(normal, details)[0]
    expected = block.feedforward_gain(stream) + block.feedforward(stream, None)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
