"""The gated spectral mixer: one learned channel mixing per scale, in the Hadamard domain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import ClassVar

import torch
from torch import Tensor, nn

from wavelet_lm.config import ModelConfig
from wavelet_lm.models.wavelet_lm.layers import Gain, ScaleNorm
from wavelet_lm.roles import MAP, Role
from wavelet_lm.transforms.batched_linear import batched_linear, products_stand_alone
from wavelet_lm.transforms.dtypes import as_factor, by_row, in_gpu_step
from wavelet_lm.transforms.hadamard import HadamardTransform
from wavelet_lm.transforms.joined import Joint, joined

IDENTITY_NOISE = 1e-3
GATE_NOISE = 0.02
LOW_RANK_NOISE = 0.01
MOST_SUMMED = 8  # summands that the compiler writes one after the other

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
    With `mixer_depth` D > 1, D − 1 normalised mixers act on X before the last one does;
    `mixer_depth_residuals` adds the input of every one of the D mixers to its output.
    `hadamard_top_k` leaves only the largest coefficients of X, for signals and gates alike.
    """

    component = "mixers"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rotate = (
            HadamardTransform(config.padded_channels)
            if config.mixer_transform == "fwht"
            else nn.Identity()
        )
        self.routing = (
            nn.Parameter(torch.eye(config.n_scales)) if config.cross_scale_gating else None
        )
        vectors = config.mixer_depth * config.padded_channels  # S × S, for every channel
        self.roles = {"routing": Role(vectors=vectors, component="routing and bypass")}
        self.stacked = nn.ModuleList(
            StackedMixer(config, depth) for depth in range(config.mixer_depth - 1)
        )
        self.scales = scale_mixers(config, config.mixer_depth - 1)
        self.residual = config.mixer_depth_residuals
        self.select = (
            LargestCoefficients(config.hadamard_top_k) if config.hadamard_top_k else nn.Identity()
        )
        # What acts on X itself needs the signal rotated, however few the weights' rows are.
        self.reads_rotated = bool(self.stacked) or config.hadamard_top_k > 0
        self.n_weight_rows = sum(mixer.n_input_rows for mixer in self.scales)

    def joints(self) -> Iterator[Joint]:
        """What its products read together."""
        return chain.from_iterable(joints(m.scales) for m in (self, *self.stacked))

    @property
    def counts(self) -> list[int]:
        """How many bands each of the parts has that need nothing of each other."""
        if self.routing is not None or self.reads_rotated:
            return [len(self.scales)]
        return [*map(len, alike(self.scales))]

    def forward(self, bands: Tensor) -> Tensor:
        """Bands [S, B, T, Cp], coarse to fine -> mixed bands of the same shape."""
        return together(self.parts([bands.flatten(1, 2)])).view_as(bands)

    def parts(self, bands: list[Tensor], factors: Tensor | None = None) -> list[Tensor]:
        """Rows of bands in parts of neighbours -> those of the mixed bands, all of [n, N, Cp].

        Args:
            bands: all of them, or in parts of `counts`.
            factors: [S], by which what each scale gives is multiplied.
        """
        bands = [*map(as_factor, bands)]  # once for all that reads them
        rotate_weights: nn.Module = self.rotate
        n_signal_rows = len(self.scales) * bands[0].shape[1]
        if self.reads_rotated or n_signal_rows <= self.n_weight_rows:
            bands, rotate_weights = [self.select(self.rotate(x)) for x in bands], nn.Identity()
        for stacked in self.stacked:
            bands = [stacked(*bands, self.routing)]
        if in_gpu_step(bands[0]) and not self.residual:
            return mix_scales(
                self.scales, bands, self.routing, rotate_weights, self.rotate, factors
            )
        mixed = together(mix_scales(self.scales, bands, self.routing, rotate_weights))
        mixed = self.rotate(together(bands) + mixed if self.residual else mixed)
        return [multiplied(mixed, factors)]


class LargestCoefficients(nn.Module):
    """The k entries of largest magnitude along the last dimension, the others zero.

    Straight-through: the gradient is that of the identity. Entries as large as the k-th all stay,
    so that the result depends on the values alone and not on how a device breaks ties.
    """

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        with torch.no_grad():
            size = x.abs()
            smallest = size.topk(self.k).values[..., -1:]
            dropped = torch.where(size < smallest, x, 0)
        return x - dropped


class StackedMixer(nn.Module):
    """One of the first D − 1 mixers of a stack: mixer(LN(X)) + bias.

    `mixer_depth_stabilizers` puts learned factors around it, both from 1/D, and
    `mixer_depth_residuals` adds X.
    """

    def __init__(self, config: ModelConfig, depth: int):
        super().__init__()
        self.norm = ScaleNorm(config)
        self.scales = scale_mixers(config, depth)
        self.bias = nn.Parameter(torch.zeros(config.n_scales, config.padded_channels))
        factor = 1 / config.mixer_depth
        stabilized = config.mixer_depth_stabilizers
        self.input_gain = Gain(factor) if stabilized else nn.Identity()
        self.output_gain = Gain(factor) if stabilized else nn.Identity()
        self.residual = config.mixer_depth_residuals

    def forward(self, bands: Tensor, routing: Tensor | None) -> Tensor:
        """Rotated rows [S, N, Cp] -> the same shape; gates are routed as in the last mixer."""
        x = self.input_gain(self.norm(bands[:, None]))[:, 0]
        mixed = together(mix_scales(self.scales, [x], routing, nn.Identity()))
        mixed = self.output_gain(mixed + self.bias[:, None])
        return bands + mixed if self.residual else mixed


def scale_mixers(config: ModelConfig, depth: int) -> nn.ModuleList:
    """One mixer per scale, coarse to fine, for the position `depth` of a stack."""
    return nn.ModuleList(
        (GatedMixer if width == config.padded_channels else NarrowMixer)(width, config, depth)
        for width in config.mixer_widths
    )


def mix_scales(
    mixers: nn.ModuleList,
    bands: list[Tensor],
    routing: Tensor | None,
    rotate: nn.Module,
    rotate_mixed: nn.Module | None = None,
    factors: Tensor | None = None,
) -> list[Tensor]:
    """Every scale through its mixer, gated by X̂_r = Σ_s R_rs X_s (R = `routing`, or X̂ = X).

    Rows of bands, of all [S, N, Cp] or in parts [n, N, Cp], and routing [S, S] -> what is mixed,
    rotated by `rotate_mixed` and multiplied by `factors` [S], in parts. Neighbours of one width are
    a part and computed together.
    """
    parts = [*map(as_factor, bands)]
    groups = [[mixer] for mixer in mixers] if products_stand_alone(parts[0]) else alike(mixers)
    counts = [len(group) for group in groups]
    gates: Sequence[Tensor]
    if routing is not None:
        rows = together(parts)
        parts, gates = rows.split(counts), Routed.apply(as_factor(routing), rows, counts)
    else:
        gates = parts = parts if len(parts) == len(groups) else together(parts).split(counts)
    scaled = [None] * len(groups) if factors is None else factors.split(counts)
    return [
        mix_alike(group, x, gate, rotate, rotate_mixed or nn.Identity(), each)
        for group, x, gate, each in zip(groups, parts, gates, scaled, strict=True)
    ]


def together(parts: Sequence[Tensor]) -> Tensor:
    """Parts of bands, each [n, ..., Cp] -> [S, ..., Cp]."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def mix_alike(
    mixers: list[GatedMixer | NarrowMixer],
    x: Tensor,
    gate: Tensor,
    rotate: nn.Module,
    rotate_mixed: nn.Module,
    factors: Tensor | None,
) -> Tensor:
    """The mixers of n scales of one width w: Y = (W X) ⊙ φ(G X̂) + U Vᵀ X, between A and B.

    Rows x and gate input X̂ [n, N, Cp] -> [n, N, Cp]; `rotate` acts on the rows of the weights
    that read them, and `rotate_mixed` on the result, or on the columns of B where these are fewer.
    `factors` [n] of what is mixed become part of W and U.
    """
    cores, narrow = mixers, isinstance(mixers[0], NarrowMixer)
    if narrow:
        A = rotate(matrices([mixer.A for mixer in mixers]))
        narrow_x = batched_linear(x, A)
        x, gate = narrow_x, narrow_x if gate is x else batched_linear(gate, A)
        cores, rotate = [mixer.mixer for mixer in mixers], nn.Identity()
    first = cores[0]
    W, *G = rotated([[core.matrix() for core in cores], *gate_matrices(cores)], rotate)
    y = batched_linear(x, multiplied(W, factors))
    if G:
        y = y * first.activation(batched_linear(gate, *G))
    if first.V is not None:
        V, U = rotate(matrices([core.V.T for core in cores])), matrices([core.U for core in cores])
        y = y + batched_linear(batched_linear(x, V), multiplied(U, factors))
    if not narrow:
        return rotate_mixed(y)
    B = matrices([mixer.B for mixer in mixers])
    if isinstance(rotate_mixed, nn.Identity) or y.shape[1] <= B.shape[2]:
        return rotate_mixed(batched_linear(y, B))
    return batched_linear(y, rotate_mixed.of_columns(B))


def multiplied(x: Tensor, factors: Tensor | None) -> Tensor:
    """x [n, rows, C] times factors [n], in x's dtype; as it is without factors."""
    return x if factors is None else (x * by_row(factors, x)).to(x.dtype)


def gate_matrices(cores: Sequence[GatedMixer]) -> list[list[nn.Parameter]]:
    """G of every mixer, in one list, or none."""
    return [] if cores[0].G is None else [[core.G for core in cores]]


def matrices(parts: Sequence[Tensor]) -> Tensor:
    """n matrices of one shape [out, in], read together: [n, out, in]."""
    return joined(parts).unflatten(0, (len(parts), -1))


def rotated(weights: Sequence[Sequence[Tensor]], rotate: nn.Module) -> list[Tensor]:
    """Lists of n matrices [w, w], each list as [n, w, w], after H on all rows in one transform."""
    if isinstance(rotate, nn.Identity):
        return [matrices(parts) for parts in weights]
    return list(rotate(matrices(list(chain(*weights)))).split([*map(len, weights)]))


def alike(mixers: nn.ModuleList) -> list[list[GatedMixer | NarrowMixer]]:
    """Neighbours of one width, which are computed together."""
    return [list(group) for _, group in groupby(mixers, key=lambda mixer: mixer.width)]


def joints(mixers: nn.ModuleList) -> Iterator[Joint]:
    """The weights that `mix_alike` reads together."""
    for group in alike(mixers):
        cores = group
        if isinstance(group[0], NarrowMixer):
            yield Joint([mixer.A for mixer in group])
            yield Joint([mixer.B for mixer in group])
            cores = [mixer.mixer for mixer in group]
        maps = [] if isinstance(cores[0].W, ExponentialMatrix) else [[core.W for core in cores]]
        maps += gate_matrices(cores)
        if maps:
            yield Joint(list(chain(*maps)))
        if cores[0].U is not None:
            yield Joint([core.U for core in cores])


class Routed(torch.autograd.Function):
    """Σ_s R_rs X_s for R [S, S] and rows X [S, N, Cp], as parts of so many scales each.

    On a GPU a compiled step takes it as weighted sums, which become part of what reads or wrote
    them, and not as a product with an inner size of S; so the parts' gradients are never put
    together. On a CPU it is the product, for each of the sums would read all bands again, from
    beyond the fast caches.
    """

    @staticmethod
    def forward(ctx, routing: Tensor, bands: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        """[S, S], [S, N, Cp] -> each [n, N, Cp]."""
        ctx.save_for_backward(routing, bands)
        if sums_are_written_out(bands):
            return weighted_sums(routing, [bands]).split(sizes)
        return torch.tensordot(routing, bands, dims=1).split(sizes)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Each [n, N, Cp] -> [S, S], [S, N, Cp]."""
        routing, bands = ctx.saved_tensors
        if sums_are_written_out(bands):
            for_bands = weighted_sums(routing.T, grads)
        else:
            grads = (torch.cat(grads),) if len(grads) > 1 else grads
            for_bands = torch.tensordot(routing.T, *grads, dims=1)
        for_routing = [grad.flatten(1) @ bands.flatten(1).T for grad in grads]
        return torch.cat(for_routing), for_bands, None


def sums_are_written_out(bands: Tensor) -> bool:
    """Whether a routing of bands [S, N, Cp] is no product."""
    return torch.compiler.is_compiling() and bands.is_cuda and len(bands) <= MOST_SUMMED


def weighted_sums(weights: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Σ_s weights_rs x_s for [S, S] and parts of x, each [n, N, Cp] -> [S, N, Cp]."""
    columns = weights.split([*map(len, parts)], 1)
    sums = [(w[:, :, None, None] * part).sum(1) for w, part in zip(columns, parts, strict=True)]
    return sum(sums).to(parts[0].dtype)


class GatedMixer(nn.Module):
    """The weights of Y = (W X) ⊙ φ(G X̂) + (X V) Uᵀ over `width` channels; `mix_alike` computes it.

    W starts at I + 1e-3 N(0, 1) (1e-3/√Cp with `stab_mixer_eps_scaling`; divided by its spectral
    norm with `stab_spectral_norm`), G at N(0, 0.02), U and V (of rank `low_rank`) at N(0, 0.01).
    """

    roles: ClassVar = {"W": MAP, "G": MAP, "U": MAP, "V": MAP}

    def __init__(self, width: int, config: ModelConfig, depth: int = 0):
        super().__init__()
        noise = IDENTITY_NOISE
        if config.stabilized("mixer_eps_scaling"):
            noise /= math.sqrt(config.padded_channels)
        if config.mixer_depth_stabilizers:
            noise /= depth + 1
        if config.mixer_exp_parametrization:
            self.W = ExponentialMatrix(width, noise)
        else:
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
        self.width = width
        self.n_input_rows = width * (2 if config.use_mixer_gate else 1) + rank

    def matrix(self) -> Tensor:
        """W [width, width]."""
        return self.W() if isinstance(self.W, ExponentialMatrix) else self.W


class ExponentialMatrix(nn.Module):
    """W = I + diag(exp θ) N with fixed unit noise N, so that updates of θ act multiplicatively.

    θ starts at log(noise). N is a frozen parameter: part of the weights, never trained.
    """

    roles: ClassVar = {"noise": MAP}

    def __init__(self, width: int, noise: float):
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((width,), math.log(noise)))
        self.noise = nn.Parameter(torch.randn(width, width), requires_grad=False)

    def forward(self) -> Tensor:
        """W, [width, width]."""
        eye = torch.eye(len(self.log_scale), dtype=self.noise.dtype, device=self.noise.device)
        return eye + self.log_scale.exp()[:, None] * self.noise


class NarrowMixer(nn.Module):
    """A `GatedMixer` of fewer channels between the projections A (Cp → width) and B (back)."""

    def __init__(self, width: int, config: ModelConfig, depth: int = 0):
        super().__init__()
        Cp = config.padded_channels
        self.A = nn.Parameter(torch.randn(width, Cp) / math.sqrt(Cp))
        self.mixer = GatedMixer(width, config, depth)
        self.B = nn.Parameter(torch.randn(Cp, width) / math.sqrt(width))
        self.width = self.n_input_rows = width
        # A narrows the signal and, apart, what the gates read.
        narrowed = 2 if config.cross_scale_gating else 1
        self.roles = {"A": Role(is_map=True, vectors=narrowed), "B": MAP}
