"""FwPKM's updates while generating: the closed form against autograd, and in a model's state."""

import pytest
import torch

from tests.conftest import perturb, tiny_config
from wavelet_lm.inference.engine import generate
from wavelet_lm.models.registry import build_model
from wavelet_lm.models.wavelet_lm.memory import FastWeightMemory, learning

C, LR, CHUNK = 8, 0.7, 5


def make_memory():
    memory = FastWeightMemory(C, 16, 3, 2, LR, CHUNK, learns=True).double()
    for p in memory.parameters():
        p.data.normal_()
    return memory


def slow_update(memory, deltas, chunk):
    """One gradient step on a dense table of deltas [rows, C] for one text, by autograd."""
    deltas = deltas.clone().requires_grad_()
    rows, weights = memory.read_plan(chunk[None])
    table = memory.values.weight.detach() + deltas
    y = (weights.detach()[0, ..., None] * table[rows[0]]).sum((1, 2))
    ((y[:-1] - chunk[1:].detach()) ** 2).mean().backward()
    return (deltas - LR * deltas.grad).detach()


def dense(memory, state, b):
    table = torch.zeros(memory.n_rows + 1, C, dtype=torch.float64)
    table[state.rows[b]] = state.deltas[b]
    return table[:-1]


@torch.no_grad()
def test_closed_form_equals_autograd_over_several_chunks():
    memory = make_memory()
    state = learning(memory.fresh_state(2))
    expected = torch.zeros(2, memory.n_rows, C, dtype=torch.float64)
    for _ in range(4):
        x = torch.randn(2, CHUNK, C, dtype=torch.float64)
        y, state = memory.adapt(x, state)
        for b in range(2):
            rows, weights = memory.read_plan(x[b : b + 1])
            table = memory.values.weight + expected[b]
            torch.testing.assert_close(y[b], (weights[0, ..., None] * table[rows[0]]).sum((1, 2)))
            with torch.enable_grad():
                expected[b] = slow_update(memory, expected[b], x[b])
            torch.testing.assert_close(dense(memory, state, b), expected[b])


@torch.no_grad()
def test_any_pieces_learn_the_same():
    memory = make_memory()
    x = torch.randn(1, 3 * CHUNK, C, dtype=torch.float64)
    _, whole = memory.adapt(x, learning(memory.fresh_state(1)))
    state = learning(memory.fresh_state(1))
    for t in range(3 * CHUNK):
        _, state = memory.adapt(x[:, t : t + 1], state)
    assert torch.equal(whole.rows, state.rows)
    torch.testing.assert_close(whole.deltas, state.deltas)
    assert state.recent.shape[1] == 0


def make_model(**overrides):
    config = tiny_config(
        fwpkm_inference_updates=True, fwpkm_update_lr=5.0, fwpkm_chunk_size=4, **overrides
    )
    torch.manual_seed(0)
    return perturb(build_model(config, 23).double()).eval()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"loop_iterations": 2},
        {"multinodal_enabled": True, "multinodal_cell_dim": 8, "multinodal_num_cells": 2},
    ],
)
@torch.no_grad()
def test_chunks_of_a_generated_text_give_the_same_logits(overrides):
    """Updates happen between tokens, wherever the calls are cut; the passed state is kept."""
    model = make_model(**overrides)
    prompt, text = torch.randint(23, (2, 6)), torch.randint(23, (2, 19))
    start = learning(model(prompt)[1])
    whole, _ = model(text, start)
    for lengths in ([1] * 19, [3, 5, 11]):
        state, parts = start, []
        for chunk in text.split(lengths, dim=1):
            logits, state = model(chunk, state)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    plain, _ = model(text, model(prompt)[1])
    torch.testing.assert_close(plain[:, :4], whole[:, :4], rtol=0, atol=1e-10)
    assert (plain[:, 4:] - whole[:, 4:]).abs().max() > 1e-6


def test_generation_adapts_only_when_asked():
    class Numbers:
        name, vocab_size, end_of_text = "numbers", 23, None

        def encode(self, text):
            return [int(word) for word in text.split()]

        def token_bytes(self, token):
            return f"{token} ".encode()

    texts = []
    for updates in (False, True):
        model = make_model()
        object.__setattr__(model.config, "fwpkm_inference_updates", updates)
        texts.append(generate(model, Numbers(), "1 2 3", 40, seed=3))
    assert texts[0].split()[:4] == texts[1].split()[:4]
    assert texts[0] != texts[1]
