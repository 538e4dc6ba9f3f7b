"""The expanded MLP of a block."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from wavelet_lm.config import ModelConfig

OUTPUT_GAIN = 0.02


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)², element by element, of any shape (So et al., 2021, "Primer")."""
    return torch.relu(x).square()


ACTIVATIONS = {"gelu": nn.functional.gelu, "relu2": relu2}


class MLP(nn.Module):
    """Linear(C → C·expansion), `mlp_activation`, …, Linear(→ C); `mlp_layers` linears.

    The last matrix starts at 0.02 of torch's default (1/√hidden of it with `stab_ff_scaling`) and
    its bias at 0, so that a new block is nearly the identity.
    """

    component = "MLP"

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = config.C * config.mlp_expansion
        widths = [config.C] + [hidden] * (config.mlp_layers - 1) + [config.C]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.activation = ACTIVATIONS[config.mlp_activation]
        gain = hidden**-0.5 if config.stabilized("ff_scaling") else OUTPUT_GAIN
        with torch.no_grad():
            self.linears[-1].weight.mul_(gain)
            self.linears[-1].bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        shape = x.shape
        x = x.flatten(0, -2)  # as rows, the compiler sums a bias's gradient where it makes it
        for linear in self.linears[:-1]:
            x = self.activation(linear(x))
        return self.linears[-1](x).view(shape)
