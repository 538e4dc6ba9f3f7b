"""One block of a WaveletLM.

decompose → (norm) → + running mean → (gate) → mix every scale → (norm) → reconstruct → project →
add, then what the delta memory recalls, of the block's input or of this sum → add, then MLP and
product-key memories → add.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wavelet_lm.config import ModelConfig
from wavelet_lm.models.wavelet_lm.delta_memory import DeltaMemory
from wavelet_lm.models.wavelet_lm.layers import Gain, PhaseGate, ScaleNorm, added_up
from wavelet_lm.models.wavelet_lm.memory import FastWeightMemory, FastWeights, ProductKeyMemory
from wavelet_lm.models.wavelet_lm.mixer import SpectralMixer, together
from wavelet_lm.models.wavelet_lm.mlp import MLP
from wavelet_lm.roles import declared
from wavelet_lm.transforms.dropout import Dropout
from wavelet_lm.transforms.dtypes import as_factor, by_row, in_gpu_step
from wavelet_lm.transforms.means import (
    ExponentialMean,
    ExponentialMeanState,
    RunningMeanState,
    WindowedMeanState,
    running_mean,
)

PROJECTION_GAIN = 1e-3


class BlockState(NamedTuple):
    """What a block remembers of a text.

    wavelet: the histories of its delays; mean: of the running mean, None without bypass; memory:
    what the FwPKM has learned, None where it does not adapt; delta: the delta memory's matrices
    [B, heads · dk · dv], None without it.
    """

    wavelet: tuple[Tensor, ...]
    mean: RunningMeanState | WindowedMeanState | ExponentialMeanState | None
    memory: FastWeights | None
    delta: Tensor | None


class Block(nn.Module):
    """(x, e, μ_prev) → (x, μ), where μ is the running mean of the block's input."""

    component = "gains"  # its own parameters, and the learned factors of its parts

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, Cp = config.C, config.padded_channels
        self.pad = nn.ZeroPad1d((0, Cp - C)) if Cp != C else nn.Identity()
        self.embedding_gain = nn.Parameter(torch.zeros(C)) if config.per_layer_embedding else None
        self.norm1 = nn.LayerNorm(C)
        self.decomposed_norm = ScaleNorm(config) if config.wavelet_decomp_norm else nn.Identity()
        self.bypass = MeanBypass(config) if config.decompose_bypass else None
        self.phase_gate = PhaseGate(config) if config.phase_gating else nn.Identity()
        self.mixer = SpectralMixer(config)
        self.mixed_norm = ScaleNorm(config) if config.wavelet_recon_norm else nn.Identity()
        # Whether nothing before or after the mixer needs all bands beside each other.
        self.mixes_parts = all(
            isinstance(module, nn.Identity)
            for module in (self.decomposed_norm, self.phase_gate, self.mixed_norm)
        )
        self.mixer_dropout = Dropout(config.dropout_mixer)
        self.scale_weights = nn.Parameter(torch.ones(config.n_scales))
        self.projection = (
            nn.Identity() if config.skip_proj_out else declared(nn.Linear(Cp, C), "projection")
        )
        self.projection_dropout = Dropout(config.dropout_projection)
        self.delta_memory = DeltaMemory(config) if config.delta_memory else None
        self.spectral_gain = Gain() if config.learned_residual else nn.Identity()
        self.feedforward_gain = Gain() if config.learned_residual else nn.Identity()
        branches = feedforward_branches(config)
        self.feedforward = FeedForward(config, branches) if branches else None
        if not config.skip_proj_out:
            scaled = config.stabilized("proj_out_scaling")
            gain = (C * config.layers) ** -0.5 if scaled else PROJECTION_GAIN
            with torch.no_grad():
                self.projection.weight.mul_(gain)
                self.projection.bias.zero_()

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        mean_prev: Tensor | None,
        wavelet: nn.Module,
        state: BlockState | None = None,
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        """Run the block on a text or on its next chunk.

        Args:
            x, embedding: [B, T, C]; the residual stream, and the token embeddings before dropout.
            mean_prev: the previous block's running mean [B, T, C], or one vector for all positions
                [B, 1, C] (the carry of the last window), or None.
            wavelet: the decomposition to use, which blocks may share.
            state: what the previous chunk's call returned; None starts a text.

        Returns:
            The new residual stream, this block's running mean (None without bypass), the state.
        """
        wavelet_state, mean_state, memory, delta = (None,) * 4 if state is None else state
        mean = None
        if self.bypass is not None:
            mean, mean_state = self.bypass.average(x, mean_state)
        if self.embedding_gain is not None:
            x = self.with_embedding(x, embedding)

        h = self.norm1(x)
        details, wavelet_state = wavelet.decompose(self.pad(h), wavelet_state)
        parts = self.with_past(details, mean, mean_prev)
        x = self.spectral_gain(x) + self.mixed_signal(parts, wavelet)
        if self.delta_memory is not None:
            source = x if self.delta_memory.after_mixing else h
            recalled, delta = self.delta_memory(source, details, delta)
            x = x + recalled
        y = self.feedforward_gain(x)
        if self.feedforward is not None:
            update, memory = self.feedforward(x, memory)
            y = y + update
        return y, mean, BlockState(wavelet_state, mean_state, memory, delta)

    def with_embedding(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x + γ ⊙ e, [B, T, C]."""
        return x + self.embedding_gain * embedding

    def with_past(
        self, details: list[Tensor], mean: Tensor | None, mean_prev: Tensor | None
    ) -> list[Tensor]:
        """Bands [B, T, Cp], normalised, and the bypass of means [B, T, C], in parts [n, B, T, Cp].

        In one part, but where a compiled step on a GPU mixes several that need nothing of each
        other: then no band's gradient is put together with others'.
        """
        details = [*map(as_factor, details)]
        norm, bypass, in_gpu = self.decomposed_norm, self.bypass, in_gpu_step(details[0])
        counts = self.mixer.counts if in_gpu and self.mixes_parts else [len(details)]
        if in_gpu and mean is not None and not isinstance(norm, ScaleNorm):
            gains, g = bypass.summand(mean, mean_prev)
            return [*WithMean.apply(counts, gains, g.to(details[0].dtype), *details)]
        parts = beside(details, counts)
        if mean is None:
            return [*map(norm, parts)]
        if isinstance(norm, ScaleNorm):
            return [norm(*parts, added=bypass.summand(mean, mean_prev))]
        return [bypass(*parts, mean, mean_prev)]

    def mixed_signal(self, parts: list[Tensor], wavelet: nn.Module) -> Tensor:
        """Bands in parts [n, B, T, Cp], gated and mixed, and the signal [B, T, C] they make."""
        is_normalized = isinstance(self.mixed_norm, ScaleNorm)
        if in_gpu_step(parts[0]) and not is_normalized:
            mixed = self.mixed_by_parts([self.phase_gate(part) for part in parts])
        else:
            mixed = self.mixer(self.phase_gate(*parts))
            if is_normalized:
                mixed = self.mixer_dropout(as_factor(self.mixed_norm(mixed, self.scale_weights)))
            else:
                mixed = self.mixer_dropout(mixed)
                mixed = mixed * by_row(self.scale_weights, mixed)
        signal = self.projection(wavelet.reconstruct(as_factor(mixed)))
        return self.projection_dropout(signal)

    def mixed_by_parts(self, parts: list[Tensor]) -> Tensor:
        """Gated bands in parts [n, B, T, Cp] -> [S, B, T, Cp], mixed, each times its weight.

        The weights are part of the mixers'. Where there is dropout they are part of it, so that
        what products wrote is all that is kept for the backward pass.
        """
        rows = [part.flatten(1, 2) for part in parts]
        if self.mixer_dropout.p == 0:
            rows = self.mixer.parts(rows, self.scale_weights)
        else:
            rows = self.mixer.parts(rows)
            weights = self.scale_weights.split([*map(len, rows)])
            rows = [*map(self.mixer_dropout.times, rows, weights)]
        return together(rows).unflatten(1, parts[0].shape[1:3])


class MeanBypass(nn.Module):
    """Every scale sees the whole past: c_s + η_s ⊙ g with g = μ + M μ_prev.

    η (`gains`) starts at zero, M (`cross_layer_mix`) at ½ I. μ is what `average` gives: the mean
    of all positions so far, or a learned exponential one.
    """

    component = "routing and bypass"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.average = ExponentialMean(config.C) if config.decompose_bypass_ema else running_mean
        self.padding = (0, config.padded_channels - config.C)
        self.gains = nn.Parameter(torch.zeros(config.n_scales, config.C))
        self.cross_layer_mix = nn.Linear(config.C, config.C, bias=False)
        with torch.no_grad():
            self.cross_layer_mix.weight.copy_(0.5 * torch.eye(config.C))

    def forward(self, bands: Tensor, mean: Tensor, mean_prev: Tensor | None) -> Tensor:
        """Bands [S, B, T, Cp], means [B, T, C] -> bands."""
        gains, g = self.summand(mean, mean_prev)
        return torch.addcmul(bands, gains[:, None, None], g)

    def summand(self, mean: Tensor, mean_prev: Tensor | None) -> tuple[Tensor, Tensor]:
        """η [S, Cp] and g [B, T, Cp] of means [B, T, C]."""
        g = mean if mean_prev is None else mean + self.cross_layer_mix(mean_prev)
        return nn.functional.pad(self.gains, self.padding), nn.functional.pad(g, self.padding)


def beside(bands: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Bands [B, T, C], beside each other in parts of so many: [n, B, T, C] each."""
    rows = iter([band.flatten(0, 1)[None] for band in bands])
    shape = bands[0].shape[:2]
    return [torch.cat([*islice(rows, n)]).unflatten(1, shape) for n in counts]


class WithMean(torch.autograd.Function):
    """c_s + η_s ⊙ g in parts, whose gradients for η and g are made of one reading of theirs."""

    @staticmethod
    def forward(
        ctx, counts: list[int], gains: Tensor, g: Tensor, *bands: Tensor
    ) -> tuple[Tensor, ...]:
        """η [S, C], g and S bands [B, T, C] in one dtype -> parts of so many, [n, B, T, C] each."""
        ctx.save_for_backward(gains, g)
        parts, gains = beside(bands, counts), gains[:, None, None].split(counts)
        return tuple(torch.addcmul(*each, g).to(g.dtype) for each in zip(parts, gains, strict=True))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of the parts -> those of η [S, C], of g [B, T, C], and of each band."""
        gains, g = ctx.saved_tensors
        each = [band for grad in grads for band in grad.unbind()]
        # Over each text first, as a bias's gradient: in the order in which g's is made.
        by_text = [(band * g).sum(1, dtype=gains.dtype) for band in each]
        of_g = sum(map(added_up, gains.split([*map(len, grads)]), grads))
        return None, torch.stack(by_text).sum(1), of_g, *each


def feedforward_branches(config: ModelConfig) -> dict[str, nn.Module]:
    """The branches that act on single positions, by name; empty when all are off."""
    branches: dict[str, nn.Module] = {}
    if config.mlp_expansion:
        branches["mlp"] = MLP(config)
    if config.pkm_enabled:
        branches["pkm"] = ProductKeyMemory(
            config.C, config.pkm_num_keys, config.pkm_top_k, config.pkm_heads
        )
    if config.fwpkm_enabled:
        branches["fwpkm"] = FastWeightMemory(
            config.C,
            config.fwpkm_num_keys,
            config.fwpkm_top_k,
            config.fwpkm_heads,
            config.fwpkm_update_lr,
            config.fwpkm_chunk_size,
            config.fwpkm_inference_updates,
        )
    return branches


class FeedForward(nn.Module):
    """Σ β_i branch_i(LN(x)), with learned factors β, and dropout of what the MLP gives."""

    def __init__(self, config: ModelConfig, branches: dict[str, nn.Module]):
        super().__init__()
        self.norm = nn.LayerNorm(config.C)
        self.mlp_dropout = Dropout(config.dropout_mlp)
        self.branches = nn.ModuleDict(branches)
        self.gains = nn.ModuleDict({name: Gain() for name in branches})

    def forward(self, x: Tensor, memory: FastWeights | None) -> tuple[Tensor, FastWeights | None]:
        """[B, T, C] -> [B, T, C], and what the FwPKM has learned, None where it does not."""
        h = self.norm(x)
        total = 0
        for name, branch in self.branches.items():
            gain = self.gains[name]
            if name == "fwpkm":
                y, memory = branch.read_text(h, memory)
            else:
                y = branch(h)
            if name == "mlp":
                total = total + self.mlp_dropout.times(y[None], gain.gain[None])[0]
            else:
                total = total + gain(y)
        return total, memory
