"""Small layers that several parts of a block use."""

import torch
from torch import Tensor, nn

from wavelet_lm.config import ModelConfig


class ScaleNorm(nn.Module):
    """A LayerNorm of its own for each scale, over bands [S, B, T, Cp]."""

    component = "norms"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_scales, config.padded_channels))
        self.bias = nn.Parameter(torch.zeros(config.n_scales, config.padded_channels))

    def forward(self, bands: Tensor) -> Tensor:
        """[S, B, T, Cp] -> the same shape."""
        normal = nn.functional.layer_norm(bands, bands.shape[-1:])
        return torch.addcmul(self.bias[:, None, None], normal, self.weight[:, None, None])


class PhaseGate(nn.Module):
    """The approximation a gates every other band: d_s ⊙ 2σ(γ_s ⊙ W a).

    W [Cp, Cp] starts at zero, and the gates therefore at 1; it is one matrix for all bands, which
    differ by γ (`gains` [S − 1, Cp], ones): one product a position, however many bands there are.
    """

    component = "routing and bypass"

    def __init__(self, config: ModelConfig):
        super().__init__()
        Cp = config.padded_channels
        self.proj = nn.Linear(Cp, Cp, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.gains = nn.Parameter(torch.ones(config.n_scales - 1, Cp))

    def forward(self, bands: Tensor) -> Tensor:
        """Bands [S, B, T, Cp], the approximation first -> the same, which is not gated itself."""
        approximation, details = bands[:1], bands[1:]
        phase = self.gains[:, None, None] * self.proj(approximation)
        return torch.cat((approximation, details * (2 * phase.sigmoid())))


def by_row(factors: Tensor, x: Tensor) -> Tensor:
    """Factors [...], one for each of the first parts of x [..., rows, C], in a shape to multiply x.

    In a compiled step on a GPU that is [..., rows, 1]: their gradient is then a sum over each row,
    which the compiler takes where x's gradient is made, and a sum of these few; else it writes the
    product of x and its gradient, and reads it.
    """
    if factors.ndim:
        factors = factors.reshape(*factors.shape, *[1] * (x.ndim - factors.ndim))
    if torch.compiler.is_compiling() and x.is_cuda and torch.is_grad_enabled():
        return factors.expand(*x.shape[:-1], 1)
    return factors


class Gain(nn.Module):
    """One learned factor."""

    keeps_dtype = True

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape, [...] -> the same shape."""
        return (x * by_row(self.gain, x)).to(x.dtype)
