import pytest
import torch

from tests.conftest import perturb, tiny_config
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.registry import build_model
from wavelet_lm.models.wavelet_lm.model import Carry

V = 23
BASE = {"multinodal_enabled": True, "multinodal_num_cells": 3, "multinodal_cell_dim": 8}


def make(**overrides):
    return perturb(build_model(tiny_config(**BASE, **overrides), V).double()).eval()


def tokens():
    return torch.randint(V, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("combination, n", [("mean", 3), ("sum", 1)])
def test_logits_are_the_combined_logits_of_the_cells(combination, n):
    model = make(multinodal_combination=combination)
    cells = sum(cell(tokens())[0] for cell in model.cells) / n
    torch.testing.assert_close(model(tokens())[0], cells)


def test_cells_start_differently():
    weights = [cell.embedding.weight for cell in build_model(tiny_config(**BASE), V).cells]
    assert not torch.equal(weights[0], weights[1])


def test_gates_are_their_formula_and_start_open():
    model = make(multinodal_cross_cell_gating=True, multinodal_cross_cell_gate_interval=2)
    (gate,) = model.gates  # two blocks, one gate after the second
    plain = make()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("gates")}
    plain.load_state_dict(state)
    idx = tokens()
    streams = [cell.start(idx) for cell in plain.cells]
    for i in range(2):
        streams = [
            cell.run_block(i, stream, None)[0]
            for cell, stream in zip(plain.cells, streams, strict=True)
        ]
    xs = [stream.x for stream in streams]
    logits = 0
    for i, cell in enumerate(plain.cells):
        others = (xs[(i + 1) % 3] + xs[(i + 2) % 3]) / 2
        x = xs[i] * (1 + torch.tanh(others @ gate.proj.weight.T))
        logits = logits + cell.head(cell.finish(streams[i]._replace(x=x))) / 3
    torch.testing.assert_close(model(idx)[0], logits)
    gate.proj.weight.data.zero_()
    torch.testing.assert_close(model(idx)[0], plain(idx)[0])


def test_bags_keep_their_features_and_are_made_from_the_seed():
    model = make(multinodal_features_per_cell=5, multinodal_bagged_eps=-0.5)
    bags = [cell.bag.keep for cell in model.cells]
    assert all(int(keep.sum()) == 5 for keep in bags)
    assert not torch.equal(bags[0], bags[1])
    again = make(multinodal_features_per_cell=5)
    assert torch.equal(again.cells[2].bag.keep, bags[2])
    embedding = model.cells[1].start(tokens()).embedding
    assert (embedding[..., ~bags[1]] == -0.5).all()


def test_the_gradient_is_scaled_and_the_loss_is_not():
    model = make()
    loss, _ = model.loss(tokens(), tokens())
    loss.backward()
    grad = model.cells[0].embedding.weight.grad.clone()
    model.zero_grad()
    plain, _ = LanguageModel.loss(model, tokens(), tokens())
    plain.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(grad * 3**0.5, model.cells[0].embedding.weight.grad)


def test_the_carry_reaches_every_cell():
    model = make(data_order="sequential")
    _, state = model(tokens())
    carry = model.next_window(state).mean
    assert carry.shape == (2, 24)
    for k, cell in enumerate(model.cells):
        part = carry.clone()
        part[:, 8 * k : 8 * k + 8] = 0
        assert not torch.equal(model(tokens(), Carry(part))[0], model(tokens(), Carry(carry))[0])
        torch.testing.assert_close(cell.next_window(state[k]).mean, carry[:, 8 * k : 8 * k + 8])
