"""float8: which layers, how far off, and that nothing else changes; by emulation, on a CPU."""

import pytest
import torch

from tests.conftest import tiny_config
from wavelet_lm.models.cost import breakdown
from wavelet_lm.models.registry import build_model
from wavelet_lm.roles import maps
from wavelet_lm.training.float8 import use_float8

VOCAB = 32


@pytest.fixture(scope="module")
def models():
    """The same model twice, the second one in float8."""
    pytest.importorskip("torchao")
    config = tiny_config(C=32, mlp_expansion=2, low_rank=0)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(build_model(config, VOCAB))
    use_float8(made[1], emulate=True)
    return made


def test_all_linear_layers_but_the_head_multiply_in_float8(models):
    linears, converted = (
        {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        for model in models
    )
    assert linears.keys() == converted.keys()
    assert {n for n, kind in converted.items() if kind == "Linear"} == {"head"}
    assert sum(kind == "Float8Linear" for kind in converted.values()) > 10


def test_names_roles_and_weights_stay(models):
    plain, converted = models
    assert plain.state_dict().keys() == converted.state_dict().keys()
    for (name, a), b in zip(plain.named_parameters(), converted.parameters(), strict=True):
        assert torch.equal(a, b), name
    names = [{n for n, p in m.named_parameters() if p in maps(m)} for m in models]
    assert names[0] == names[1]
    n = sum(p.numel() for p in converted.parameters())
    assert breakdown(plain.config, VOCAB).n_params == n


def test_loss_and_gradients_are_near_those_in_full(models):
    tokens = torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(3))
    losses, gradients = [], []
    for model in models:
        model.eval()  # no dropout
        loss, _ = model.loss(tokens, tokens.roll(-1, 1))
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    for name, g in gradients[0].items():
        if name.endswith("mlp.linears.0.weight"):
            error = (gradients[1][name] - g).norm() / g.norm()
            assert 0 < error < 0.3, name
