"""The parts of a fused model.

- The Hadamard transform on the way into the mixers moves onto their weights, and the one on the way
  out onto the weights that read its result.
- The mixers of one width become one batched product, and so do the reconstruction's update nets,
  which do not wait for one another, since their inputs are all known: the reconstruction is
  linear in what they give, c_0 = √2^L a − Σ_k √2^k U_k(d_k).
- The second norm's gain and bias, the learned factors and the scale weights move into the matrices
  beside them; a memory's query and sub-keys become one matrix where that is smaller.

Every part is built from trained modules, which it leaves as they are, and computes in their
precision. Every matrix of a part is a module of `linear.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from wavelet_lm.fusion.linear import (
    BatchedLinear,
    FusedLinear,
    OneOfBatch,
    as_parameter,
    shallow_copy,
)
from wavelet_lm.kernels.step_matmul import is_step
from wavelet_lm.models.wavelet_lm.block import Block, FeedForward
from wavelet_lm.models.wavelet_lm.layers import Gain
from wavelet_lm.models.wavelet_lm.memory import ProductKeyMemory
from wavelet_lm.models.wavelet_lm.mixer import GatedMixer, NarrowMixer, StackedMixer
from wavelet_lm.roles import declared
from wavelet_lm.transforms.lifting import LiftingWavelet

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
        order = [s for group in self.scales for s in group]
        self.order = None if order == sorted(order) else [order.index(s) for s in range(len(order))]

    def forward(self, bands: Tensor, routing: Tensor | None) -> Tensor:
        """Bands [S, B, T, Cp] -> mixed bands; gates are routed as in `mix_scales`."""
        gates = bands if routing is None else routed(routing, bands)
        mixed = [
            mix(_take(bands, scales), _take(gates, scales))
            for mix, scales in zip(self.groups, self.scales, strict=True)
        ]
        y = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        return y if self.order is None else y[self.order]


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
        if self.down is not None and self.gate is not None:
            x, gate = self.down(torch.cat((x, gate), 1)).split(B, dim=1)
        elif self.down is not None:
            x = self.down(x)
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


class UpdateNets(nn.Module):
    """The nets that a reconstruction runs on the details, all at once: −Σ_k √2^k U_k(d_k).

    Args:
        wavelet: whose nets depend on nothing but their input.
        transform: H where the details come in the Hadamard domain, else an identity.
    """

    component = "wavelet nets"

    def __init__(self, wavelet: LiftingWavelet, transform: nn.Module):
        super().__init__()
        nets = list(reversed(wavelet.update if wavelet.own_update is None else wavelet.own_update))
        self.transform = transform
        self.hidden, turn = None, transform
        lasts = nets
        if not isinstance(nets[0], nn.Linear):
            firsts, lasts = [net[0] for net in nets], [net[-1] for net in nets]
            self.hidden = _batch([transform(m.weight) for m in firsts], firsts)
            turn = nn.Identity()
        self.last = _batch([turn(m.weight) for m in lasts], lasts)
        factors = [-(2 ** (k / 2)) for k in reversed(range(len(nets)))]
        self.factors = as_parameter(self.last.weight.new_tensor(factors)[:, None, None, None])

    def decomposing(self, update: nn.ModuleList) -> nn.ModuleList:
        """The update nets of the decomposition, which read from here what is the same here.

        It saves memory, and what one of them reads the cache may still hold for the other.
        """
        rotated = not isinstance(self.transform, nn.Identity)
        nets: list[nn.Module] = []
        for i, net in enumerate(reversed(update)):
            last = OneOfBatch(self.last, i)
            if self.hidden is None:
                nets.append(net if rotated else last)
            else:
                first = net[0] if rotated else OneOfBatch(self.hidden, i)
                nets.append(nn.Sequential(first, nn.GELU(), last))
        return nn.ModuleList(reversed(nets))

    def forward(self, details: Tensor) -> Tensor:
        """Details [L, B, T, Cp] -> [B, T, Cp], not in the Hadamard domain."""
        x = details
        if self.hidden is not None:
            x = nn.functional.gelu(self.hidden(x))
        return (self.last(x) * self.factors).sum(0)


class FusedReconstruction(nn.Module):
    """c_0 = √2^L a − Σ_k √2^k U_k(d_k), then the projection W_o c_0 + b where there is one.

    In the Hadamard domain the projection is [√2^L W_o H | W_o] of a and the sum side by side.
    """

    def __init__(self, updates: UpdateNets, projection: nn.Module):
        super().__init__()
        self.updates, self.gain = updates, 2 ** (len(updates.factors) / 2)
        self.transform, self.projection = updates.transform, projection
        self.side_by_side = isinstance(projection, nn.Linear) and not isinstance(
            updates.transform, nn.Identity
        )
        if self.side_by_side:
            W_o = projection.weight
            both = torch.cat((self.gain * updates.transform(W_o), W_o), 1)
            self.projection = FusedLinear.of(both, projection.bias)

    def forward(self, bands: Tensor) -> Tensor:
        """Mixed bands [S, B, T, Cp] -> [B, T, C]."""
        a, sums = bands[0], self.updates(bands[1:])
        if self.side_by_side:
            return self.projection(torch.cat((a, sums), -1))
        return self.projection(torch.add(sums, self.transform(a), alpha=self.gain))


def _batch(weights: list[Tensor], layers: list[nn.Linear]) -> BatchedLinear:
    return BatchedLinear(torch.stack(weights), torch.stack([m.bias for m in layers]))


class FusedFeedForward(nn.Module):
    """A `FeedForward` whose branches read the normalised input in one product.

    The norm's gain and bias are in that product, and the branches' learned factors in their last
    matrices or read weights.

    Args:
        apart: the MLP and the memories have products of their own, for weights of several
            precisions.
    """

    def __init__(self, feedforward: FeedForward, apart: bool):
        super().__init__()
        branches, gains = feedforward.branches, feedforward.gains
        rows: list[tuple[Tensor, Tensor]] = []
        self.mlp = None
        if "mlp" in branches:
            first, *middle, last = branches["mlp"].linears
            rows.append((first.weight, first.bias))
            last = FusedLinear.of(gains["mlp"](last.weight), gains["mlp"](last.bias))
            self.mlp = declared(nn.ModuleList([*middle, last]), branches["mlp"].component)
        self.memories = nn.ModuleList()
        for name in ("pkm", "fwpkm"):
            if name in branches:
                memory = FusedMemory(branches[name], gains[name])
                weight = memory.input_weight(branches[name])
                rows.append((weight, weight.new_zeros(len(weight))))
                self.memories.append(memory)
        n = 1 if apart and self.mlp is not None else len(rows)
        norm = feedforward.norm
        self.first, self.sizes = nn.ModuleList(), []
        for group in filter(None, (rows[:n], rows[n:])):
            weight = torch.cat([weight for weight, _ in group])
            bias = torch.cat([bias for _, bias in group])
            self.first.append(FusedLinear.of(weight * norm.weight, bias + weight @ norm.bias))
            self.sizes.append([len(weight) for weight, _ in group])
        if self.mlp is not None:
            declared(self.first[0], self.mlp.component)

    def forward(self, x: Tensor, memory: None) -> tuple[Tensor, None]:
        """[B, T, C] -> [B, T, C]; as `FeedForward` without fast weights."""
        normal = layer_norm(x, x.shape[-1:])
        parts = iter(
            [
                part
                for product, sizes in zip(self.first, self.sizes, strict=True)
                for part in product(normal).split(sizes, dim=-1)
            ]
        )
        total: Tensor | int = 0
        if self.mlp is not None:
            h = next(parts)
            for matrix in self.mlp:
                # A CPU has another GELU, of other roundings, for what is not contiguous, as the
                # part of one text is and that of several is not.
                h = matrix(nn.functional.gelu(h.contiguous() if is_step(h) else h))
            total = h
        for branch in self.memories:
            total = total + branch(next(parts))
        return total, memory


class FusedMemory(nn.Module):
    """A `ProductKeyMemory` that is given its queries, or its scores where that takes less weights.

    The scores' matrix is K_a Q and K_b Q with 2 · heads · √num_keys rows, in place of Q with C rows
    and of the keys.
    """

    def __init__(self, memory: ProductKeyMemory, gain: Gain):
        super().__init__()
        C = memory.query.weight.shape[0]
        n_keys = memory.keys_a.weight.numel() + memory.keys_b.weight.numel()
        self.gives_scores = 2 * memory.heads * memory.n_subkeys * C <= C * C + n_keys
        self.gain = gain
        self.memory = shallow_copy(memory)
        self.memory.query = None
        if self.gives_scores:
            self.memory.keys_a = self.memory.keys_b = None

    def input_weight(self, memory: ProductKeyMemory) -> Tensor:
        """The matrix [rows, C] whose product `forward` takes."""
        Q = memory.query.weight
        if not self.gives_scores:
            return Q
        halves = Q.view(memory.heads, 2, -1, Q.shape[1])
        # [heads, 2, √num_keys, half]
        keys = torch.stack((memory.keys_a.weight, memory.keys_b.weight), 1)
        return (keys @ halves).reshape(-1, Q.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Scores or queries [B, T, rows] -> [B, T, C]."""
        memory = self.memory
        if self.gives_scores:
            a, b = x.view(*x.shape[:2], memory.heads, 2, memory.n_subkeys).unbind(3)
        else:
            a, b = memory.scores(x)
        rows, weights = memory.plan(a, b)
        return memory.read(rows, self.gain(weights))


def routed(routing: Tensor, bands: Tensor) -> Tensor:
    """Σ_j routing_ij · bands_j for bands [S, B, T, Cp]."""
    S, B, T, Cp = bands.shape
    x = bands.reshape(S, B * T, Cp)
    if bands.is_cpu and is_step(bands) and B > 1:  # as for each text alone
        gates = torch.stack([routing @ x[:, b].contiguous() for b in range(B)], 1)
    else:
        gates = torch.tensordot(routing, x, dims=1)
    return gates.reshape(S, B, T, Cp)


def _take(x: Tensor, scales: list[int]) -> Tensor:
    """x[scales], as a view where they follow each other."""
    if scales == list(range(scales[0], scales[0] + len(scales))):
        return x[scales[0] : scales[0] + len(scales)]
    return x[scales]
