"""Small layers that several parts of a block use."""

import torch
from torch import Tensor, nn

from wavelet_lm.config import ModelConfig
from wavelet_lm.kernels.scale_norm import scale_norm_backward_in_one
from wavelet_lm.transforms.dtypes import by_row, in_gpu_step, without_autocast


class ScaleNorm(nn.Module):
    """A LayerNorm of its own for each scale, over bands [S, B, T, Cp]."""

    component = "norms"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_scales, config.padded_channels))
        self.bias = nn.Parameter(torch.zeros(config.n_scales, config.padded_channels))

    def forward(
        self,
        bands: Tensor,
        factors: Tensor | None = None,
        added: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[S, B, T, Cp] -> the same shape.

        Args:
            factors: [S], which multiply what each scale gives.
            added: gains [S, Cp] and a signal [B, T, Cp], whose product is added.
        """
        weight, bias = self.weight, self.bias
        if factors is not None:
            weight, bias = weight * factors[:, None], bias * factors[:, None]
        gains, signal = added or (None, None)
        if in_gpu_step(bands):
            if signal is not None:  # as the bands: what reads their sum rounds it
                signal = signal.to(bands.dtype).flatten(0, 1)
            rows = NormalizedBands.apply(bands.flatten(1, 2), weight, bias, gains, signal)
            return rows.view_as(bands)
        bands = normalized(bands, weight[:, None, None], bias[:, None, None])
        return bands if added is None else torch.addcmul(bands, gains[:, None, None], signal)


def normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """w ⊙ x̂ + b of x [..., C], with w and b of shapes that go with it, in x's shape."""
    return torch.addcmul(bias, nn.functional.layer_norm(x, x.shape[-1:]), weight)


class NormalizedBands(torch.autograd.Function):
    """w ⊙ x̂ + b + a ⊙ m, with a backward pass that reads its gradient and x once.

    So in a compiled step on a GPU: the compiler writes the gradient in float32, and reads it and x
    again for the sums over the rows.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, gains: Tensor | None, signal: Tensor | None
    ) -> Tensor:
        """[S, N, C], [S, C], [S, C], [S, C] or None, [N, C] or None -> [S, N, C]."""
        ctx.save_for_backward(x, weight, gains, signal)
        y = normalized(x, weight[:, None], bias[:, None])
        return y if gains is None else torch.addcmul(y, gains[:, None], signal)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[S, N, C] -> those of what `forward` is given, in their shapes."""
        x, weight, gains, signal = ctx.saved_tensors
        grad = grad.to(x.dtype)  # mixers read the result in it
        of_x, sums = scale_norm_backward_in_one(grad, x, weight, signal)
        of_weight, of_bias, *of_gains = sums.sum(0).unbind()
        if signal is None:
            return of_x, of_weight, of_bias, None, None
        return of_x, of_weight, of_bias, *of_gains, added_up(gains, grad)


def added_up(gains: Tensor, grad: Tensor) -> Tensor:
    """Σ_s a_s ⊙ g_s of gains [S, C] and g [S, ..., C] -> [..., C], written in g's dtype."""
    gains = gains.view(len(gains), *[1] * (grad.ndim - 2), -1)
    with without_autocast(grad):  # which would write the sum in float32
        return (gains * grad).to(grad.dtype).sum(0)


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


class Gain(nn.Module):
    """One learned factor."""

    keeps_dtype = True

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape, [...] -> the same shape."""
        return (x * by_row(self.gain, x)).to(x.dtype)
