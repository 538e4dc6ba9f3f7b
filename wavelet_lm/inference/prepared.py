"""A model's weights put together for reading: the same function in fewer and larger products.

`prepare` leaves the model alone and returns a twin of folded parts (`folds.py`), which shares the
weights that need no change. A part with a switch that stands in the way of a fold (a norm or a
selection between transform and product, packets, several bases, nets that depend on their input)
runs as it was trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wavelet_lm.inference.folds import (
    FoldedFeedForward,
    FoldedMixer,
    FoldedReconstruction,
    ProjectedReconstruction,
    ScaleWeights,
    UpdateNets,
    cast,
    shallow_copy,
)
from wavelet_lm.models.block import Block, BlockState
from wavelet_lm.models.language_model import LanguageModel
from wavelet_lm.models.memory import ProductKeyMemory
from wavelet_lm.models.multinodal import MultinodalLM
from wavelet_lm.models.wavelet_lm import WaveletLM
from wavelet_lm.transforms.crawl import Crawl, Filter
from wavelet_lm.transforms.lifting import LiftingWavelet


@torch.no_grad()
def prepare(
    model: LanguageModel, dtype: torch.dtype | None = None, *, adapt: bool = False
) -> LanguageModel:
    """A twin of `model` for inference, in eval mode.

    Args:
        dtype: of its weights; None keeps the model's. Folds are computed in the model's own.
        adapt: the fast weights will learn, and the second memories are kept as they are.
    """
    dtype = dtype or next(model.parameters()).dtype
    if isinstance(model, MultinodalLM):
        twin = shallow_copy(model)
        twin.cells = nn.ModuleList(prepare(cell, dtype, adapt=adapt) for cell in model.cells)
        twin.gates = cast(model.gates, dtype)
    elif isinstance(model, WaveletLM):
        twin = _prepare_cell(model, dtype, adapt)
    else:
        twin = cast(model, dtype)
    twin.config = model.config.replace(fwpkm_inference_updates=adapt)
    return twin.requires_grad_(False).eval()


def _prepare_cell(model: WaveletLM, dtype: torch.dtype, adapt: bool) -> WaveletLM:
    twin = shallow_copy(model)
    for name in ("embedding", "bag", "embedding_dropout", "final_norm", "head_dropout", "head"):
        setattr(twin, name, cast(getattr(model, name), dtype))
    twin.wavelets = cast(_fixed_filters(model.wavelets), dtype)
    if model.head.weight is model.embedding.weight:
        twin.head.weight = twin.embedding.weight
    transform = model.blocks[0].mixer.rotate
    if not FoldedMixer.leaves_rotated(model.blocks[0]):
        transform = nn.Identity()
    updates: list[UpdateNets | None] = []
    for wavelet, twin_wavelet in zip(model.wavelets, twin.wavelets, strict=True):
        updates.append(None)
        if isinstance(wavelet, LiftingWavelet) and wavelet.is_static:
            updates[-1] = cast(UpdateNets(wavelet, transform), dtype)
            updates[-1].share_weights(twin_wavelet)
    twin.blocks = nn.ModuleList(
        PreparedBlock(block, model.wavelets[n], updates[n], dtype, adapt)
        for block, n in ((block, i % len(updates)) for i, block in enumerate(model.blocks))
    )
    return twin


class PreparedBlock(nn.Module):
    """`Block.forward` with folded parts; the names of the steps are those of `Block`."""

    def __init__(
        self,
        block: Block,
        wavelet: nn.Module,
        updates: UpdateNets | None,
        dtype: torch.dtype,
        adapt: bool,
    ):
        """wavelet: the block's, as trained; updates: for a reconstruction that can be folded."""
        super().__init__()
        self.pad = cast(block.pad, dtype)
        self.embedding_gain = None
        if block.embedding_gain is not None:
            self.embedding_gain = nn.Parameter(block.embedding_gain.to(dtype))
        self.norm1 = cast(block.norm1, dtype)
        self.decomposed_norm = cast(block.decomposed_norm, dtype)
        self.bypass = None if block.bypass is None else cast(block.bypass, dtype)
        self.phase_gate = cast(block.phase_gate, dtype)
        if FoldedMixer.folds(block.mixer):
            mixer: nn.Module = FoldedMixer(block, stay_rotated=updates is not None)
        else:
            mixer = nn.Sequential(block.mixer, block.mixed_norm, ScaleWeights(block.scale_weights))
        self.mixer = cast(mixer, dtype)
        self.projection = nn.Identity()
        if updates is None:
            self.reconstruction = None
            self.projection = cast(block.projection, dtype)
        elif isinstance(block.projection, nn.Linear):
            folded = ProjectedReconstruction(updates, wavelet, block.projection)
            self.reconstruction = cast(folded, dtype)
        else:
            self.reconstruction = FoldedReconstruction(updates)
        self.spectral_gain = cast(block.spectral_gain, dtype)
        self.feedforward_gain = cast(block.feedforward_gain, dtype)
        self.feedforward = None
        if block.feedforward is not None:
            parts = block.feedforward if adapt else FoldedFeedForward(block.feedforward)
            self.feedforward = cast(parts, dtype)

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        mean_prev: Tensor | None,
        wavelet: nn.Module,
        state: BlockState | None = None,
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        wavelet_state, mean_state, memory = (None, None, None) if state is None else state
        mean = None
        if self.bypass is not None:
            mean, mean_state = self.bypass.average(x, mean_state)
        if self.embedding_gain is not None:
            x = torch.addcmul(x, self.embedding_gain, embedding)

        bands, wavelet_state = wavelet.decompose(self.pad(self.norm1(x)), wavelet_state)
        bands = self.decomposed_norm(torch.stack(bands))
        if mean is not None:
            bands = self.bypass(bands, mean, mean_prev)
        mixed = self.mixer(self.phase_gate(bands))
        if self.reconstruction is not None:
            signal = self.reconstruction(mixed)
        else:
            signal = self.projection(wavelet.reconstruct(list(mixed.unbind())))

        x = self.spectral_gain(x) + signal
        y = self.feedforward_gain(x)
        if self.feedforward is not None:
            update, memory = self.feedforward(x, memory)
            y = y + update
        return y, mean, BlockState(wavelet_state, mean_state, memory)


def _fixed_filters(module: nn.Module) -> nn.Module:
    """The module with every crawl as the filter that it has become."""
    if isinstance(module, Crawl):
        return Filter(module.taps().detach(), module.min_lag)
    twin = shallow_copy(module)
    twin._modules = {name: _fixed_filters(child) for name, child in module._modules.items()}
    return twin


def weight_bytes_per_token(model: LanguageModel) -> int:
    """Bytes of a prepared model's weights that one token of one text reads.

    As often as they are read: blocks may share a wavelet, and a reconstruction that is not folded
    reads the update nets again. Of tables the rows that are read count.
    """
    if isinstance(model, MultinodalLM):
        gates = n_bytes(model.gates) * model.config.loop_iterations
        return gates + sum(weight_bytes_per_token(cell) for cell in model.cells)
    total = n_bytes(model.final_norm) + n_bytes(model.head)
    total += model.embedding.weight[0].numel() * model.embedding.weight.element_size()
    for i in range(len(model.order) * model.config.loop_iterations):
        number = model.order[i % len(model.order)]
        block, wavelet = model.blocks[number], model.wavelets[number % len(model.wavelets)]
        total += n_bytes(block) + n_bytes(wavelet)
        if i == 0 and block.bypass is not None:  # nothing comes before it
            total -= n_bytes(block.bypass.cross_layer_mix)
        for part in block.modules():
            if isinstance(part, ProductKeyMemory):
                values, n_rows = part.values, part.heads * part.top_k
                total += (n_rows - len(values)) * values.shape[1] * values.element_size()
        for part in wavelet.modules():
            if isinstance(part, LiftingWavelet) and block.reconstruction is None:
                total += n_bytes(part.update) if part.own_update is None else 0
            elif isinstance(part, LiftingWavelet) and part.own_update is not None:
                total -= n_bytes(part.own_update)
    return total


def n_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
