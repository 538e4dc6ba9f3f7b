"""The mixers of a fused model, from the bands up to the reconstruction.

- The Hadamard transform on the way into the mixers moves onto their weights, and the one on the way
  out onto the weights that read its result.
- The mixers of one width become one batched product.
- The learned factors and the scale weights move into the matrices beside them.

Every part is built from trained modules, which it leaves as they are, and computes in their
precision. Every matrix of a part is a module of `linear.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wavelet_lm.fusion.linear import BatchedLinear
from wavelet_lm.kernels.step_matmul import is_step
from wavelet_lm.models.wavelet_lm.block import Block
from wavelet_lm.models.wavelet_lm.mixer import GatedMixer, NarrowMixer, StackedMixer
from wavelet_lm.roles import declared

MIXER_BANDS = ("mixer_coarse", "mixer_mid", "mixer_fine")


def mixer_band(scale: int) -> str:
    """The component of a scale's mixer: scales 0–2 are coarse, 3–5 mid, the others fine."""
    return MIXER_BANDS[min(scale // 3, 2)]


class FusedMixer(nn.Module):
    """A `SpectralMixer` with what follows up to the reconstruction.

    The result stays in the Hadamard domain where that is asked for and no norm stands in the way
    (`leaves_rotated`).

    Args:
        stay_rotated: what reads the result is fused with the transform.
        precision: of the mixers' weights by scale; those of several are not fused.
    """

    def __init__(self, block: Block, stay_rotated: bool, precision: Sequence[object]):
        super().__init__()
        mixer = block.mixer
        fuse_transform = not mixer.reads_rotated
        self.routing = mixer.routing
        self.rotate_in = nn.Identity() if fuse_transform else mixer.rotate
        self.select = mixer.select
        self.stacked = nn.ModuleList(FusedStackedMixer(m, precision) for m in mixer.stacked)
        fuse_weights = isinstance(block.mixed_norm, nn.Identity) and not mixer.residual
        weights = block.scale_weights if fuse_weights else torch.ones_like(block.scale_weights)
        rotate = mixer.rotate if fuse_transform else nn.Identity()
        self.scales = MixerGroups(list(mixer.scales), weights, rotate, precision)
        self.residual = mixer.residual
        self.rotate_out = mixer.rotate
        if stay_rotated and self.leaves_rotated(block):
            self.rotate_out = nn.Identity()
        self.norm = nn.Identity()
        if not fuse_weights:
            self.norm = nn.Sequential(block.mixed_norm, ScaleWeights(block.scale_weights))

    @staticmethod
    def leaves_rotated(block: Block) -> bool:
        """Whether the transform back can be left to what reads the mixed bands."""
        return isinstance(block.mixed_norm, nn.Identity)

    def forward(self, bands: Tensor) -> Tensor:
        """Bands [S, B, T, Cp] -> mixed bands of the same shape, × ω_s."""
        bands = self.select(self.rotate_in(bands))
        for stacked in self.stacked:
            bands = stacked(bands, self.routing)
        mixed = self.scales(bands, self.routing)
        return self.norm(self.rotate_out(bands + mixed if self.residual else mixed))


class FusedStackedMixer(nn.Module):
    """A `StackedMixer` of grouped mixers."""

    def __init__(self, mixer: StackedMixer, precision: Sequence[object]):
        super().__init__()
        self.norm, self.input_gain = mixer.norm, mixer.input_gain
        ones = torch.ones(len(mixer.scales), dtype=mixer.bias.dtype, device=mixer.bias.device)
        self.scales = MixerGroups(list(mixer.scales), ones, nn.Identity(), precision)
        self.bias, self.output_gain, self.residual = mixer.bias, mixer.output_gain, mixer.residual

    def forward(self, bands: Tensor, routing: Tensor | None) -> Tensor:
        """Bands [S, B, T, Cp], routing [S, S] or None -> bands of the same shape."""
        mixed = self.scales(self.input_gain(self.norm(bands)), routing) + self.bias[:, None, None]
        mixed = self.output_gain(mixed)
        return bands + mixed if self.residual else mixed


class MixerGroups(nn.Module):
    """The mixers of all scales, those of one width and precision as one `MixerGroup`.

    Args:
        weights: ω [S], which go into the mixers' last matrices.
        rotate: H where the mixers read bands that are not transformed, else an identity.
    """

    def __init__(
        self,
        mixers: list[GatedMixer | NarrowMixer],
        weights: Tensor,
        rotate: nn.Module,
        precision: Sequence[object],
    ):
        super().__init__()
        kinds = [(mixer.width, p) for mixer, p in zip(mixers, precision, strict=True)]
        self.scales = [
            [s for s, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)
        ]
        self.groups = nn.ModuleList(
            declared(MixerGroup([mixers[s] for s in g], weights[g], rotate), mixer_band(g[0]))
            for g in self.scales
        )
        # Slices and not indices: a list would be copied to the device in every step.
        self.runs_of_groups = [_runs(group) for group in self.scales]

    def forward(self, bands: Tensor, routing: Tensor | None) -> Tensor:
        """Bands [S, B, T, Cp] -> mixed bands; gates are routed as in `mix_scales`."""
        gates = bands if routing is None else routed(routing, bands)
        pieces: list[tuple[int, Tensor]] = []
        for mix, runs in zip(self.groups, self.runs_of_groups, strict=True):
            x = _joined([bands[run] for run in runs])
            gate = x if routing is None else _joined([gates[run] for run in runs])
            parts = mix(x, gate).split([run.stop - run.start for run in runs])
            pieces += [(run.start, part) for run, part in zip(runs, parts, strict=True)]
        return _joined([piece for _, piece in sorted(pieces, key=lambda piece: piece[0])])


class MixerGroup(nn.Module):
    """The mixers of n scales of one width w: Y = (W X) ⊙ φ(G X̂) + U V X, then × ω."""

    def __init__(self, mixers: list[GatedMixer | NarrowMixer], weights: Tensor, rotate: nn.Module):
        super().__init__()
        narrow = isinstance(mixers[0], NarrowMixer)
        cores = [m.mixer for m in mixers] if narrow else mixers
        # The transform acts on whatever reads the bands: A, or W, G and V themselves.
        inner = nn.Identity() if narrow else rotate
        first = cores[0]
        self.activation, self.width = first.activation, first.width
        out_weights = torch.ones_like(weights) if narrow else weights
        V = [] if first.V is None else [inner(m.V.T) for m in cores]
        W = [inner(m.matrix()) * w for m, w in zip(cores, out_weights, strict=True)]
        self.value = BatchedLinear(
            torch.stack([torch.cat((w, v)) for w, v in zip(W, V, strict=True)])
            if V
            else torch.stack(W)
        )
        self.gate = self.low_rank = self.down = self.up = None
        if first.G is not None:
            self.gate = BatchedLinear(torch.stack([inner(m.G) for m in cores]))
        if V:
            self.low_rank = BatchedLinear(
                torch.stack([m.U * w for m, w in zip(cores, out_weights, strict=True)])
            )
        if narrow:
            self.down = BatchedLinear(torch.stack([rotate(m.A) for m in mixers]))
            self.up = BatchedLinear(
                torch.stack([m.B * w for m, w in zip(mixers, weights, strict=True)])
            )

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate input [n, B, T, Cp] -> [n, B, T, Cp]."""
        B = x.shape[1]
        if self.down is not None and self.gate is not None and gate is not x:
            x, gate = self.down(torch.cat((x, gate), 1)).split(B, dim=1)
        elif self.down is not None:
            x = gate = self.down(x)
        value = self.value(x)
        y = value[..., : self.width]
        if self.gate is not None:
            y = y * self.activation(self.gate(gate))
        if self.low_rank is not None:
            y = y + self.low_rank(value[..., self.width :])
        return y if self.up is None else self.up(y)


class ScaleWeights(nn.Module):
    """bands × ω_s."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.weights = nn.Parameter(weights[:, None, None, None].detach().clone())

    def forward(self, bands: Tensor) -> Tensor:
        """[S, B, T, Cp] -> the same shape."""
        return bands * self.weights


def routed(routing: Tensor, bands: Tensor) -> Tensor:
    """Σ_j routing_ij · bands_j for bands [S, B, T, Cp]."""
    S, B, T, Cp = bands.shape
    if bands.is_cpu and is_step(bands):  # number by number, so that a text is what it is alone
        wide = torch.promote_types(bands.dtype, torch.float32)
        weights = routing.to(wide)[:, :, None, None, None].unbind(1)
        terms = [w * band for w, band in zip(weights, bands.to(wide).unbind(), strict=True)]
        return sum(terms[1:], terms[0]).to(bands.dtype)
    x = bands.reshape(S, B * T, Cp)
    return torch.tensordot(routing, x, dims=1).reshape(S, B, T, Cp)


def _runs(scales: list[int]) -> list[slice]:
    """Ascending numbers as the slices of those that follow each other."""
    starts = [s for s in scales if s - 1 not in scales]
    stops = [s + 1 for s in scales if s + 1 not in scales]
    return list(map(slice, starts, stops))


def _joined(parts: list[Tensor]) -> Tensor:
    """Tensors [n, B, T, C] one after the other; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
