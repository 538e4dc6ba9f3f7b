"""The folded parts of a model that is prepared for reading.

- The Hadamard transform on the way into the mixers moves onto their weights, and the one on the way
  out onto the weights that read its result.
- The mixers of one width become one batched product, and so do the first matrices of the
  reconstruction's update nets, which do not wait for one another, since their inputs are all known.
- The reconstruction is linear in what these nets give, c_0 = √2^L a − Σ_k √2^k U_k(d_k), so their
  last matrices and the projection become one matrix.
- The second norm's gain and bias, the learned factors and the scale weights move into the matrices
  beside them; a memory's query and sub-keys become one matrix where that is smaller.

Every part is built from trained modules, which it leaves as they are, and computes in their
precision; `cast` then changes it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from wavelet_lm.models.block import Block, FeedForward
from wavelet_lm.models.layers import Gain
from wavelet_lm.models.memory import ProductKeyMemory
from wavelet_lm.models.mixer import GatedMixer, NarrowMixer, SpectralMixer
from wavelet_lm.transforms.lifting import LiftingWavelet


class FoldedMixer(nn.Module):
    """A `SpectralMixer` of one layer, with what follows up to the reconstruction.

    Scales of one width are one `MixerGroup`. The result stays in the Hadamard domain where the
    reconstruction's matrices were rotated for it (`leaves_rotated`).
    """

    def __init__(self, block: Block, stay_rotated: bool):
        super().__init__()
        mixer = block.mixer
        self.routing = mixer.routing
        has_norm = not isinstance(block.mixed_norm, nn.Identity)
        stay_rotated = stay_rotated and self.leaves_rotated(block)
        weights = torch.ones_like(block.scale_weights) if has_norm else block.scale_weights
        self.rotate = nn.Identity() if stay_rotated else mixer.rotate
        widths = [m.width for m in mixer.scales]
        self.scales = [
            [s for s, w in enumerate(widths) if w == width] for width in dict.fromkeys(widths)
        ]
        self.groups = nn.ModuleList(
            MixerGroup([mixer.scales[s] for s in group], weights[group], mixer.rotate)
            for group in self.scales
        )
        order = [s for group in self.scales for s in group]
        self.order = None if order == sorted(order) else [order.index(s) for s in range(len(order))]
        self.norm = nn.Sequential(block.mixed_norm, ScaleWeights(block.scale_weights))
        if not has_norm:
            self.norm = nn.Identity()

    @staticmethod
    def folds(mixer: SpectralMixer) -> bool:
        """Whether the mixer's products read the transformed bands directly."""
        return not mixer.reads_rotated

    @staticmethod
    def leaves_rotated(block: Block) -> bool:
        """Whether the transform back can be left to what reads the mixed bands."""
        return FoldedMixer.folds(block.mixer) and isinstance(block.mixed_norm, nn.Identity)

    def forward(self, bands: Tensor) -> Tensor:
        """Bands [S, B, T, Cp] -> mixed bands of the same shape, × ω_s."""
        S, B, T, Cp = bands.shape
        x = bands.view(S, B * T, Cp)
        gates = x if self.routing is None else torch.tensordot(self.routing, x, dims=1)
        mixed = [
            mix(_take(x, scales), _take(gates, scales))
            for mix, scales in zip(self.groups, self.scales, strict=True)
        ]
        y = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        if self.order is not None:
            y = y[self.order]
        return self.norm(self.rotate(y).view(S, B, T, Cp))


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
        """x and gate input [n, M, Cp] -> [n, M, Cp]."""
        M = x.shape[1]
        if self.down is not None and self.gate is not None:
            x, gate = self.down(torch.cat((x, gate), 1)).split(M, dim=1)
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
        return bands * self.weights


class UpdateNets(nn.Module):
    """The nets that a reconstruction runs on the details, all at once: −√2^k U_k(d_k) summed.

    Args:
        wavelet: whose nets depend on nothing but their input.
        transform: H where the details come in the Hadamard domain, else an identity.
    """

    def __init__(self, wavelet: LiftingWavelet, transform: nn.Module):
        super().__init__()
        nets = reconstruction_nets(wavelet)
        self.transform = transform
        firsts, lasts = first_and_last(nets)
        self.hidden, turn = None, transform
        if firsts:
            weight = torch.stack([transform(m.weight) for m in firsts])
            self.hidden = BatchedLinear(weight, torch.stack([m.bias for m in firsts]))
            turn = nn.Identity()
        weight = torch.cat([turn(m.weight) for m in lasts], 1)
        factors = update_factors(len(nets)).to(weight)
        self.factors = nn.Parameter(factors[:, None, None])
        self.last = _linear(weight, sum(f * m.bias for f, m in zip(factors, lasts, strict=True)))

    def share_weights(self, wavelet: LiftingWavelet) -> None:
        """Let the twin's wavelet read its update nets from here, where the same matrices are.

        It saves memory, and what one of them reads the cache may still hold for the other.
        """
        firsts, lasts = first_and_last(reconstruction_nets(wavelet))
        rotated = not isinstance(self.transform, nn.Identity)
        if firsts and not rotated:
            _view(firsts, self.hidden.weight.unbind())
        if firsts or not rotated:
            _view(lasts, self.last.weight.chunk(len(lasts), 1))

    def activations(self, details: Tensor) -> Tensor:
        """Details [L, B, T, Cp] -> what the last matrices read, [B, T, L · hidden]."""
        _, B, T, _ = details.shape
        x = details.flatten(1, 2)
        if self.hidden is not None:
            x = nn.functional.gelu(self.hidden(x))
        return (x * self.factors).transpose(0, 1).reshape(B, T, -1)


class FoldedReconstruction(nn.Module):
    """c_0 = √2^L a − Σ_k √2^k U_k(d_k), for a block that adds c_0 itself (`skip_proj_out`)."""

    def __init__(self, updates: UpdateNets):
        super().__init__()
        self.updates, self.gain = updates, 2 ** (len(updates.factors) / 2)

    def forward(self, bands: Tensor) -> Tensor:
        """Mixed bands [S, B, T, Cp] -> [B, T, C]."""
        sums = self.updates.last(self.updates.activations(bands[1:]))
        return torch.add(sums, self.updates.transform(bands[0]), alpha=self.gain)


class ProjectedReconstruction(nn.Module):
    """W_o c_0 + b as one product: with W_o in the update nets' last matrices."""

    def __init__(self, updates: UpdateNets, wavelet: LiftingWavelet, projection: nn.Linear):
        """wavelet: as it was trained, so that the matrices are multiplied in its precision."""
        super().__init__()
        nets = reconstruction_nets(wavelet)
        firsts, lasts = first_and_last(nets)
        turn = nn.Identity() if firsts else updates.transform
        W_o, gain = projection.weight, 2 ** (len(nets) / 2)
        parts = [gain * updates.transform(W_o), *(W_o @ turn(m.weight) for m in lasts)]
        factors = update_factors(len(nets)).to(W_o)
        bias = sum(f * m.bias for f, m in zip(factors, lasts, strict=True))
        self.last = _linear(torch.cat(parts, 1), W_o @ bias + projection.bias)
        self.updates = shallow_copy(updates)
        self.updates.last = None  # it is part of the one here

    def forward(self, bands: Tensor) -> Tensor:
        """Mixed bands [S, B, T, Cp] -> [B, T, C]."""
        return self.last(torch.cat((bands[0], self.updates.activations(bands[1:])), -1))


def reconstruction_nets(wavelet: LiftingWavelet) -> list[nn.Module]:
    """The nets that the reconstruction runs on the details, in the order of the bands."""
    return list(reversed(wavelet.update if wavelet.own_update is None else wavelet.own_update))


def first_and_last(nets: Sequence[nn.Module]) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """The first and last matrices of two-layer nets; no first ones for nets of one matrix."""
    if isinstance(nets[0], nn.Linear):
        return [], list(nets)
    return [net[0] for net in nets], [net[-1] for net in nets]


def update_factors(L: int) -> Tensor:
    """[L]: −√2^k, in the order of the bands."""
    return torch.tensor([-(2 ** (k / 2)) for k in reversed(range(L))], dtype=torch.float64)


class FoldedFeedForward(nn.Module):
    """A `FeedForward` whose branches read the normalised input in one product.

    The norm's gain and bias are in that product, and the branches' learned factors in their last
    matrices or read weights.
    """

    def __init__(self, feedforward: FeedForward):
        super().__init__()
        branches, gains = feedforward.branches, feedforward.gains
        rows: list[tuple[Tensor, Tensor]] = []
        self.mlp = None
        if "mlp" in branches:
            first, *middle, last = branches["mlp"].linears
            rows.append((first.weight, first.bias))
            last = _linear(gains["mlp"](last.weight), gains["mlp"](last.bias))
            self.mlp = nn.ModuleList([*middle, last])
        self.memories = nn.ModuleList()
        for name in ("pkm", "fwpkm"):
            if name in branches:
                memory = FoldedMemory(branches[name], gains[name])
                weight = memory.input_weight(branches[name])
                rows.append((weight, weight.new_zeros(len(weight))))
                self.memories.append(memory)
        self.sizes = [len(weight) for weight, _ in rows]
        norm = feedforward.norm
        weight = torch.cat([weight for weight, _ in rows])
        bias = torch.cat([bias for _, bias in rows])
        self.first = _linear(weight * norm.weight, bias + weight @ norm.bias)

    def forward(self, x: Tensor, memory: None) -> tuple[Tensor, None]:
        """[B, T, C] -> [B, T, C]; as `FeedForward` without fast weights."""
        parts = iter(self.first(layer_norm(x, x.shape[-1:])).split(self.sizes, dim=-1))
        total: Tensor | int = 0
        if self.mlp is not None:
            h = next(parts)
            for matrix in self.mlp:
                h = matrix(nn.functional.gelu(h))
            total = h
        for branch in self.memories:
            total = total + branch(next(parts))
        return total, memory


class FoldedMemory(nn.Module):
    """A `ProductKeyMemory` that is given its queries, or its scores where that takes less weights.

    The scores' matrix is K_a Q and K_b Q with 2 · heads · √num_keys rows, in place of Q with C rows
    and of the keys.
    """

    def __init__(self, memory: ProductKeyMemory, gain: Gain):
        super().__init__()
        C = memory.query.weight.shape[0]
        n_keys = memory.keys_a.numel() + memory.keys_b.numel()
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
        keys = torch.stack((memory.keys_a, memory.keys_b), 1)  # [heads, 2, √num_keys, half]
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


class PreparedLinear(nn.Linear):
    """`nn.Linear` for reading."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None and bias_apart(x):
            return linear(x, self.weight) + self.bias
        return linear(x, self.weight, self.bias)


class BatchedLinear(nn.Module):
    """n products at once: x [n, M, in] -> [n, M, out], with a weight [n, out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias[:, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.bmm(x, self.weight.mT)
        if bias_apart(x):
            return torch.bmm(x, self.weight.mT) + self.bias
        return torch.baddbmm(self.bias, x, self.weight.mT)


def bias_apart(x: Tensor) -> bool:
    """Whether a product leaves its bias to a sum of its own.

    For one text on a GPU the compiler turns a product into a reduction, a kernel of its own that
    also does what stands around it, but not a product with a bias inside.
    """
    return x.is_cuda and torch.compiler.is_compiling()


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in another dtype; weights that have it already are shared.

    Single learned factors stay as they are: a 0-d tensor does not raise the dtype of what it
    multiplies.
    """
    if type(module) is nn.Linear:
        bias = None if module.bias is None else module.bias.detach().to(dtype)
        return _linear(module.weight.detach().to(dtype), bias)
    twin = shallow_copy(module)
    for name, p in module._parameters.items():
        if p is not None:
            value = p.detach() if isinstance(module, Gain) else p.detach().to(dtype)
            twin._parameters[name] = nn.Parameter(value, requires_grad=False)
    twin._modules = {
        name: None if child is None else cast(child, dtype)
        for name, child in module._modules.items()
    }
    return twin


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module with the same parts, which can be replaced without changing the original."""
    twin = copy.copy(module)
    twin._modules, twin._parameters = dict(module._modules), dict(module._parameters)
    twin._buffers = dict(module._buffers)
    return twin


def _linear(weight: Tensor, bias: Tensor | None) -> PreparedLinear:
    """A linear layer of these weights."""
    with torch.device("meta"):
        layer = PreparedLinear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _view(layers: list[nn.Linear], weights: Sequence[Tensor]) -> None:
    """Let the layers read these weights, which are equal to their own."""
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)


def _take(x: Tensor, scales: list[int]) -> Tensor:
    """x[scales], as a view where they follow each other."""
    if scales == list(range(scales[0], scales[0] + len(scales))):
        return x[scales[0] : scales[0] + len(scales)]
    return x[scales]
