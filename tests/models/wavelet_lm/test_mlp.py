"""The expanded MLP against its formula."""

import pytest
import torch

from tests.conftest import perturb, tiny_config
from wavelet_lm.models.wavelet_lm.mlp import MLP


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_it_computes_what_its_docstring_says(activation):
    torch.manual_seed(0)
    config = tiny_config(mlp_expansion=2, mlp_layers=3, mlp_activation=activation)
    mlp = perturb(MLP(config).double()).eval()
    x = torch.randn(2, 5, config.C).double()
    h = x
    for linear in mlp.linears[:-1]:
        z = h @ linear.weight.T + linear.bias
        # z Φ(z) with the normal distribution's Φ, or z² where z > 0
        h = z * torch.special.ndtr(z) if activation == "gelu" else (z * (z > 0)) ** 2
    expected = h @ mlp.linears[-1].weight.T + mlp.linears[-1].bias
    torch.testing.assert_close(mlp(x), expected, rtol=0, atol=1e-12)
