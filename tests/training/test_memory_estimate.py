"""The estimate of memory against what autograd keeps."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import tiny_config
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.training.memory_estimate import estimate_bytes, step_bytes
from wavelet_lm.training.optimizers import STATE_BYTES, Optimizer

V = 256
NETWORK = {
    "C": 64,
    "levels": 2,
    "per_scale_mixer_widths": None,
    "pkm_enabled": False,
    "fwpkm_enabled": False,
    "block_size": 96,
    "micro_batch_size": 2,
    **{f"dropout_{place}": 0.0 for place in ("embedding", "mixer", "projection", "mlp")},
}


def bytes_said(config) -> int:
    """The estimate without weights, gradients and the optimizer's state."""
    model = build_model(config, V)
    return estimate_bytes(model) - n_params(model) * (8 + STATE_BYTES[config.optimizer])


def bytes_kept(config) -> int:
    """Of all tensors that the backward pass of a step will read, weights aside."""
    model = build_model(config, V)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    tokens = torch.randint(V, (config.micro_batch_size, config.block_size))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(tokens, tokens)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"delta_bands": 0, "delta_heads": 2},
        {"delta_bands": 2, "delta_key_dim": 48},
        {"delta_value_dim": 64},
    ],
)
def test_a_delta_memory_keeps_what_is_said(sizes):
    without = tiny_config(**NETWORK)
    config = without.replace(delta_memory=True, **sizes)
    said = bytes_said(config) - bytes_said(without)
    assert bytes_kept(config) - bytes_kept(without) == pytest.approx(said, rel=0.15)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"mlp_expansion": 1}, {"mlp_expansion": 6}),
        ({"mlp_layers": 2}, {"mlp_layers": 4}),
        ({"lifting_hidden_mult": 1}, {"lifting_hidden_mult": 3}),
        ({"lifting_data_dependent": 8}, {"lifting_data_dependent": 256}),
        ({"model": "gpt", "gpt_mlp_expansion": 2}, {"model": "gpt", "gpt_mlp_expansion": 6}),
        ({"looped_blocks": True, "looped_blocks_count": 1}, {"looped_blocks_count": 3}),
    ],
)
def test_what_a_size_adds_is_what_its_module_says(less, more):
    less, more = (tiny_config(**NETWORK | less | keys) for keys in ({}, more))
    said = bytes_said(more) - bytes_said(less)
    assert bytes_kept(more) - bytes_kept(less) == pytest.approx(said, rel=0.3)


class Allocated(TorchDispatchMode):
    """The most bytes at one time of tensors that were made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        held = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage() not in held:
                self._count(tensor)
        return result

    def _count(self, tensor):
        n = tensor.untyped_storage().nbytes()
        self.now += n
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._freed, n)

    def _freed(self, n):
        self.now -= n


@pytest.mark.parametrize("name", ("Adagrad", "AdamW", "Muon"))
def test_an_optimizer_takes_what_is_said(name):
    """Its state, and beside it nothing of the size of the weights but Muon's stacks."""
    config = tiny_config(**NETWORK, optimizer=name, optimizer_eps=1e-8)
    model = build_model(config, V)
    optimizer = Optimizer(model, config)

    def step():
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        with Allocated() as allocated:
            optimizer.step(torch.tensor(2.0))
        return allocated.most

    step()  # makes what is kept
    n = n_params(model)
    state = sum(t.nbytes for t in optimizer.state()[0].values())
    assert state <= STATE_BYTES[name] * n * 1.01
    if name == "Muon":
        assert step() == pytest.approx(step_bytes(model), rel=0.4)
    else:
        assert step() <= 0.05 * n
        assert step_bytes(model) == 0
