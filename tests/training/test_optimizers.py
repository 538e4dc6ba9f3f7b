"""Optimizers: what decays, what Muon takes, and that a saved state goes on as if never saved."""

import pytest
import torch

from tests.conftest import tiny_config
from wavelet_lm.errors import UserError
from wavelet_lm.kernels.adamw import adamw_
from wavelet_lm.models.checkpoint import Checkpoint, save_checkpoint
from wavelet_lm.models.registry import build_model
from wavelet_lm.roles import maps
from wavelet_lm.training.muon import Muon
from wavelet_lm.training.optimizers import Optimizer

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
    optimizer.step()
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
    assert isinstance(muon, Muon)
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
    optimizer.step()
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


@pytest.mark.parametrize("name", ("Adagrad", "Adagrad8bit"))
def test_decoupled_decay_is_a_geometric_row(name):
    """In closed form: a row that no token touches is (1 − lr · decay)ⁿ of what it was."""
    model, optimizer = make(name, weight_decay=0.5, weight_decay_mode="decoupled", lr=0.1)
    row = model.embedding.weight[-1]
    before = row.detach().clone()
    for seed in range(5):
        torch.manual_seed(seed)
        tokens = torch.randint(VOCAB - 1, (2, 17))
        model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
        model.embedding.weight.grad[-1] = 0
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(row.detach(), before * (1 - 0.1 * 0.5) ** 5, rtol=1e-5, atol=0)
    # Coupled, the same row falls by the whole rate, here by more than there is of it.
    other, coupled = make(name, weight_decay=1e-3, lr=0.1)
    other.embedding.weight.grad = torch.zeros_like(other.embedding.weight)
    coupled.step()
    moved = before - other.embedding.weight[-1].detach()
    torch.testing.assert_close(moved.abs(), torch.full_like(before, 0.1), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ("AdamW", "AdamW8bit", "Muon"))
def test_what_is_decoupled_always_takes_no_mode(name):
    with pytest.raises(UserError, match=f"optimizer is {name}, whose decay is decoupled always"):
        tiny_config(optimizer=name, weight_decay_mode="decoupled")


@pytest.mark.parametrize(
    "reference",
    [
        lambda groups: torch.optim.Adagrad(groups, lr=0.1, eps=1e-8, foreach=True),
        lambda groups: torch.optim.Adagrad(groups, lr=0.1, eps=1e-8, fused=True),
    ],
)
def test_a_state_of_pytorchs_adagrad_goes_on_here(reference):
    """Checkpoints of before hold the state of its multi-tensor form (CUDA) or its fused one."""
    model, optimizer = make("Adagrad", lr=0.1, weight_decay=1e-4)
    twin, _ = make("Adagrad")
    named = [(n, p) for n, p in twin.named_parameters() if p.requires_grad]
    old = reference([{"params": [p for _, p in named], "weight_decay": 1e-4}])

    def step_old(seed):
        torch.manual_seed(seed)
        tokens = torch.randint(VOCAB, (2, 17))
        twin.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
        old.step()
        old.zero_grad()

    for seed in range(3):
        step_old(seed)
    saved = {f"0/{n}/{key}": value.clone() for n, p in named for key, value in old.state[p].items()}
    optimizer.load_state(saved, {})
    for seed in range(3, 6):
        # From the same weights each time: a gradient that is nothing but rounding has a sign.
        model.load_state_dict(twin.state_dict())
        step_old(seed)
        step(model, optimizer, seed)
        for (key, a), b in zip(weights(model).items(), weights(twin).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=key)
    now, _ = optimizer.state()
    assert now.keys() == saved.keys()
    assert all(now[key].item() == 6 for key in now if key.endswith("/step"))


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_of_pytorchs_adamw_goes_on_in_the_pass_of_a_gpu_and_back(fused):
    """Checkpoints of before hold the state of its fused form; the twin stands for the kernel."""
    model, optimizer = make("AdamW", lr=0.01, weight_decay=0.1)
    twin, _ = make("AdamW")
    (ours,) = optimizer.parts
    ours._update = adamw_
    matrices = maps(twin)
    named = [(n, p) for n, p in twin.named_parameters() if p.requires_grad]
    keys = {"lr": 0.01, "betas": model.config.adam_betas, "eps": 1e-8, "fused": fused}
    decayed = [{"params": [p for _, p in named if p in matrices], "weight_decay": 0.1}]
    rest = [{"params": [p for _, p in named if p not in matrices], "weight_decay": 0.0}]
    old = torch.optim.AdamW(decayed + rest, **keys)

    def step_old(seed):
        torch.manual_seed(seed)
        tokens = torch.randint(VOCAB, (2, 17))
        twin.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
        old.step()
        old.zero_grad()

    for seed in range(3):
        step_old(seed)
    saved = {f"0/{n}/{key}": value.clone() for n, p in named for key, value in old.state[p].items()}
    optimizer.load_state(saved, {})
    for seed in range(3, 6):
        # From the same weights each time: a gradient that is nothing but rounding has a sign.
        model.load_state_dict(twin.state_dict())
        step_old(seed)
        step(model, optimizer, seed)
        for (key, a), b in zip(weights(model).items(), weights(twin).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=key)
    now, _ = optimizer.state()
    assert now.keys() == saved.keys()
    assert all(now[key].item() == 6 for key in now if key.endswith("/step"))
