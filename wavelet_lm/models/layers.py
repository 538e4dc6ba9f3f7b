"""Small layers that several parts of a block use."""

import torch
from torch import Tensor, nn

from wavelet_lm.config import ModelConfig


class ScaleNorm(nn.Module):
    """A LayerNorm of its own for each scale, over bands [S, B, T, Cp]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_scales, config.padded_channels))
        self.bias = nn.Parameter(torch.zeros(config.n_scales, config.padded_channels))

    def forward(self, bands: Tensor) -> Tensor:
        normal = nn.functional.layer_norm(bands, bands.shape[-1:])
        return torch.addcmul(self.bias[:, None, None], normal, self.weight[:, None, None])


class Gain(nn.Module):
    """One learned factor."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x
