"""The gated spectral mixer: one learned channel mixing per scale, in the Hadamard domain."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from wavelet_lm.config import ModelConfig
from wavelet_lm.transforms.hadamard import HadamardTransform

IDENTITY_NOISE = 1e-3
GATE_NOISE = 0.02
LOW_RANK_NOISE = 0.01

ACTIVATIONS = {
    "silu": nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "gelu": nn.functional.gelu,
    "relu": torch.relu,
}


class SpectralMixer(nn.Module):
    """All scales of one block: X = H c, per scale Y = mixer(X), and H Y back.

    H is orthonormal and fixed, so W(Hc) = (WH)c: the transform on the way in is applied to the
    mixers' weights wherever they have fewer rows than the signal, which is nearly always so in
    training; the transform on the way out follows the gate's product and acts on the signal.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rotate = (
            HadamardTransform(config.padded_channels)
            if config.mixer_transform == "fwht"
            else nn.Identity()
        )
        self.scales = nn.ModuleList(
            GatedMixer(width, config)
            if width == config.padded_channels
            else NarrowMixer(width, config)
            for width in config.mixer_widths
        )
        self.routing = (
            nn.Parameter(torch.eye(config.n_scales)) if config.cross_scale_gating else None
        )
        self.n_weight_rows = sum(mixer.n_input_rows for mixer in self.scales)

    def forward(self, bands: Tensor) -> Tensor:
        """Bands [S, B, T, Cp], coarse to fine -> mixed bands of the same shape."""
        S, B, T, _ = bands.shape
        rotate_weights: nn.Module = self.rotate
        n_signal_rows = S * B * T
        if n_signal_rows <= self.n_weight_rows:
            bands, rotate_weights = self.rotate(bands), nn.Identity()
        gates = bands if self.routing is None else torch.tensordot(self.routing, bands, dims=1)
        mixed = [
            mixer(x, g, rotate_weights)
            for mixer, x, g in zip(self.scales, bands, gates, strict=True)
        ]
        return self.rotate(torch.stack(mixed))


class GatedMixer(nn.Module):
    """Y = (W X) ⊙ φ(G X̂) + (X V) Uᵀ over `width` channels.

    W starts at I + 1e-3 N(0, 1) (1e-3/√Cp with `stab_mixer_eps_scaling`; divided by its spectral
    norm with `stab_spectral_norm`), G at N(0, 0.02), U and V (of rank `low_rank`) at N(0, 0.01).
    """

    def __init__(self, width: int, config: ModelConfig):
        super().__init__()
        noise = IDENTITY_NOISE
        if config.stabilized("mixer_eps_scaling"):
            noise /= math.sqrt(config.padded_channels)
        W = torch.eye(width) + noise * torch.randn(width, width)
        if config.stabilized("spectral_norm"):
            W /= torch.linalg.matrix_norm(W, 2)
        self.W = nn.Parameter(W)
        self.G = (
            nn.Parameter(GATE_NOISE * torch.randn(width, width)) if config.use_mixer_gate else None
        )
        rank = config.low_rank
        self.U = nn.Parameter(LOW_RANK_NOISE * torch.randn(width, rank)) if rank else None
        self.V = nn.Parameter(LOW_RANK_NOISE * torch.randn(width, rank)) if rank else None
        self.activation = ACTIVATIONS[config.mixer_gate_activation]
        self.n_input_rows = width * (2 if config.use_mixer_gate else 1) + rank

    def forward(self, x: Tensor, gate: Tensor, rotate: nn.Module) -> Tensor:
        """x and gate input X̂ [B, T, width] -> [B, T, width]; `rotate` acts on weight rows."""
        y = linear(x, rotate(self.W))
        if self.G is not None:
            y = y * self.activation(linear(gate, rotate(self.G)))
        if self.U is not None:
            y = y + linear(linear(x, rotate(self.V.T)), self.U)
        return y


class NarrowMixer(nn.Module):
    """A `GatedMixer` of fewer channels between the projections A (Cp → width) and B (back)."""

    def __init__(self, width: int, config: ModelConfig):
        super().__init__()
        Cp = config.padded_channels
        self.A = nn.Parameter(torch.randn(width, Cp) / math.sqrt(Cp))
        self.mixer = GatedMixer(width, config)
        self.B = nn.Parameter(torch.randn(Cp, width) / math.sqrt(width))
        self.n_input_rows = width

    def forward(self, x: Tensor, gate: Tensor, rotate: nn.Module) -> Tensor:
        """x and gate input [B, T, Cp] -> [B, T, Cp]."""
        A = rotate(self.A)
        return linear(self.mixer(linear(x, A), linear(gate, A), nn.Identity()), self.B)
