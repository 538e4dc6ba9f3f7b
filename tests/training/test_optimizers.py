"""Optimizers: what decays, what Muon takes, and that a saved state goes on as if never saved."""

import pytest
import torch

from tests.conftest import tiny_config
from wavelet_lm.models.checkpoint import Checkpoint, save_checkpoint
from wavelet_lm.models.registry import build_model
from wavelet_lm.roles import maps
from wavelet_lm.training.optimizers import Optimizer
from wavelet_lm.training.precision import Precision

VOCAB = 30
NAMES = ("Adagrad", "AdamW", "Muon", "Adagrad8bit", "AdamW8bit")


def make(name, **overrides):
    """A model and its optimizer; wide enough that the 8-bit ones do quantize their state."""
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    config = tiny_config(
        **{"C": 64 if "8bit" in name else 16, "optimizer": name, "optimizer_eps": 1e-8, **overrides}
    )
    torch.manual_seed(1)
    model = build_model(config, VOCAB)
    return model, Optimizer(model, config)


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    tokens = torch.randint(VOCAB, (2, 17))
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    for part in optimizer.parts:
        part.step()
    optimizer.zero_grad()
    return loss.item()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_after_loading_is_the_step_without(name, tmp_path):
    model, optimizer = make(name)
    for seed in range(3):
        step(model, optimizer, seed)
    tensors, scalars = optimizer.state()
    if "8bit" in name:
        assert any(t.dtype == torch.uint8 for t in tensors.values())
    save_checkpoint(tmp_path / "x.safetensors", model, {"scalars": scalars}, tensors)
    losses = [step(model, optimizer, seed) for seed in (3, 4)]

    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    other, other_optimizer = make(name)
    checkpoint.load_into(other)
    other_optimizer.load_state(checkpoint.extra(), checkpoint.metadata["scalars"])
    assert [step(other, other_optimizer, seed) for seed in (3, 4)] == losses
    for (key, a), b in zip(weights(model).items(), weights(other).values(), strict=True):
        assert torch.equal(a, b), key
    # Going on has not written through to the file.
    again = Checkpoint(tmp_path / "x.safetensors").extra()
    assert all(torch.equal(again[key], checkpoint.extra()[key]) for key in again)


@pytest.mark.parametrize("name", ("Adagrad", "AdamW", "Muon"))
def test_forgetting_the_state_changes_the_next_step(name):
    """Otherwise the test above could not fail."""
    model, optimizer = make(name)
    step(model, optimizer, 0)
    before = weights(model)
    step(model, optimizer, 1)
    kept = weights(model)
    other, fresh = make(name)
    with torch.no_grad():
        for key, p in other.named_parameters():
            p.copy_(before[key])
    step(other, fresh, 1)
    assert any(not torch.equal(kept[key], p) for key, p in other.named_parameters())


def test_what_is_a_matrix():
    model = build_model(tiny_config(wavelet_decomp_norm=True), VOCAB)
    found_maps = maps(model)
    kinds = {name: p in found_maps for name, p in model.named_parameters()}
    ends = ("W", "G", "U", "V", "A", "B", "query.weight", "projection.weight", "mix.weight")
    nets = ("wavelets.", "blocks.0.feedforward.branches.mlp.", "blocks.1.feedforward.branches.mlp.")
    for name, found in kinds.items():
        in_net = name.startswith(nets) and name.endswith(".weight")
        assert found == (name.endswith(tuple("." + m for m in ends[:6]) + ends[6:]) or in_net), name
    assert sum(kinds.values()) > 20


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_matrices_and_adamw_the_rest_each_once(tied):
    model, optimizer = make("Muon", tie_embedding_to_lm_head=tied)
    muon, adamw = optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    groups = [{p for g in part.param_groups for p in g["params"]} for part in (muon, adamw)]
    trained, matrices = {p for p in model.parameters() if p.requires_grad}, maps(model)
    assert groups[0] | groups[1] == trained
    assert not groups[0] & groups[1]
    assert {n for n, p in model.named_parameters() if p in groups[0]} == {
        n for n, p in model.named_parameters() if p in matrices and p.requires_grad
    }
    assert all(group["weight_decay"] == 0 for group in adamw.param_groups)


@pytest.mark.parametrize("name", ("Adagrad", "AdamW", "Muon", "AdamW8bit"))
def test_weight_decay_shrinks_what_it_should(name):
    """With gradients of zero only the decay moves a weight."""
    model, optimizer = make(name, weight_decay=0.5, lr=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for part in optimizer.parts:
        part.step()
    matrices = maps(model)
    for key, p in model.named_parameters():
        decays = p.requires_grad and (name == "Adagrad" or p in matrices)
        assert bool((p < 1).all()) == decays, key


def test_the_rate_reaches_every_group():
    for name in ("Adagrad", "AdamW", "Muon"):
        _, optimizer = make(name)
        optimizer.set_lr(0.123)
        rates = [group["lr"] for part in optimizer.parts for group in part.param_groups]
        assert set(rates) == {0.123}


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_gradients_are_clipped_to_their_common_norm(clip):
    model, optimizer = make("AdamW")
    config = model.config
    tokens = torch.randint(VOCAB, (2, 17))
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    gradients = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert norm > 0.1
    Precision(config, torch.device("cpu")).update(optimizer, model, clip)
    factor = clip / norm if clip else 1
    for p, g in gradients.items():
        torch.testing.assert_close(p.grad, g * factor, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_overflow_in_one_half_of_muon_leaves_all_weights_finite(clip):
    """Loss scaling skips a step that overflowed; clipping must not carry it to the other half."""
    model, optimizer = make("Muon")
    precision = Precision(model.config, torch.device("cpu"))
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights(model)
    tokens = torch.randint(VOCAB, (2, 17))
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    precision.backward(loss)
    matrix = next(p for n, p in model.named_parameters() if n.endswith("scales.0.W"))
    matrix.grad[0, 0] = float("nan")
    precision.update(optimizer, model, clip)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    after = weights(model)
    matrices = maps(model)
    same = [torch.equal(before[n], after[n]) for n, p in model.named_parameters() if p in matrices]
    assert all(same)
    assert precision.scaler.get_scale() == 512
    assert not precision.collapsed
