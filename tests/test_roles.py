"""Roles: every parameter has one, and what counts and trains reads a module it has never seen."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from tests.conftest import tiny_config
from tests.models.test_properties import configs
from wavelet_lm.models.cost import BACKWARD, breakdown
from wavelet_lm.models.registry import build_model
from wavelet_lm.models.wavelet_lm import block
from wavelet_lm.models.wavelet_lm.mlp import MLP
from wavelet_lm.quantization.quantize import scheme_component
from wavelet_lm.roles import FACTOR, MAP, Role, Runs, component_of, declared, maps, uses

V = 11
# What is two-dimensional and no map: tables, and what is kept for each scale.
NO_MAPS = ("embedding", "head", "values", "gains", "routing", "norm", "weights", "bias")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs())
def test_every_parameter_has_its_role(config):
    """Muon and weight decay take what an independent list by names says, as old runs had it."""
    with torch.device("meta"):
        model = build_model(config, V)
    found, places = maps(model), {use.name: use for use in uses(model)}
    for name, p in model.named_parameters():
        words = name.replace("_", ".").split(".")
        assert (p in found) == (p.ndim == 2 and not set(words) & set(NO_MAPS)), name
        assert places[name].parameter is p
        assert places[name].component is not None, name


class NewMemory(nn.Module):
    """A module of another kind: several matrices, one run for each of two heads, and vectors."""

    component = "new memory"

    def __init__(self, config):
        super().__init__()
        self.key = nn.Linear(config.C, 6, bias=False)
        self.table = nn.Parameter(torch.randn(6, 5))
        self.roles = {"table": FACTOR}
        self.value = declared(nn.Linear(5, config.C, bias=False), "new values")
        self.decay = nn.Parameter(torch.zeros(6))

    def runs(self):
        return {self.key: Runs(1, 2)}

    def forward(self, x):
        return self.value((self.key(x) * self.decay.exp()) @ self.table)


def test_a_new_module_brings_its_roles_with_it(monkeypatch):
    """No figure, estimate, optimizer or quantizer has heard of it."""
    branches = block.feedforward_branches
    config = tiny_config(layers=2)
    before = breakdown(config, V)
    monkeypatch.setattr(
        block, "feedforward_branches", lambda c: branches(c) | {"new": NewMemory(c)}
    )
    after, C = breakdown(config, V), config.C
    names = list(after.components)
    assert names[-3:] == ["new memory", "new values", "head"]
    memory, values = (after.components[name] for name in names[-3:-1])
    assert memory.per_block == 6 * C + 30 + 6
    assert memory.flops == 2 * BACKWARD * 2 * (2 * 6 * C + 30)
    assert memory.distinct == memory.read == 2 * (6 * C + 30 + 6)
    assert values.n_params == 2 * 5 * C
    for name in before.components:
        if name != "gains":  # its branch has a learned factor
            assert after.components[name] == before.components[name]
    model = build_model(config, V)
    new = model.blocks[0].feedforward.branches["new"]
    found = maps(model)
    assert {p for p in new.parameters() if p in found} == {new.key.weight, new.value.weight}
    name = "blocks.0.feedforward.branches.new.key"
    assert component_of(model, name) == "new memory"
    assert scheme_component(model, name) == "rest"


def test_a_part_without_a_component_is_named(monkeypatch):
    monkeypatch.setattr(block.Block, "component", None)
    monkeypatch.setattr(MLP, "component", None)
    with pytest.raises(TypeError, match="no module that holds it names"):
        breakdown(tiny_config(), V)


def test_a_tied_table_is_no_map():
    table, layer = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
    layer.weight = table.weight
    assert maps(nn.Sequential(table, layer)) == set()
    assert maps(nn.Sequential(layer)) == {layer.weight}
    assert MAP.is_map and not FACTOR.is_map


class Pair(nn.Module):
    """Two tables, of which the second hangs on a part that knows nothing of rows."""

    def __init__(self):
        super().__init__()
        self.direct, self.codes = nn.Embedding(5, 3), nn.Module()
        self.codes.numbers = nn.Parameter(torch.zeros(7, 4))
        self.roles = {"codes.numbers": Role(rows=2)}


def test_a_holder_declares_the_roles_of_a_part_in_its_own_place_alone():
    pair = Pair()
    both = nn.ModuleList([pair, nn.ModuleDict({"again": pair.codes})])
    assert [use.n_read for use in uses(both)] == [3, 2 * 4, 7 * 4]
