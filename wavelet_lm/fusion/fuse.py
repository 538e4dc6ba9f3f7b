"""Fused models, which only read: the same function in fewer and larger products.

`fuse` leaves the model alone and returns another one of fused parts (`fused_….py`), which
shares the weights that need no change. A part with a switch that stands in the way (a norm between
transform and product, packets, several bases, nets that depend on their input) runs as it was
trained.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from wavelet_lm.errors import UserError
from wavelet_lm.fusion.fused_delta_memory import FusedDeltaMemory
from wavelet_lm.fusion.fused_feedforward import FusedFeedForward
from wavelet_lm.fusion.fused_mixer import MIXER_BANDS, FusedMixer, mixer_band
from wavelet_lm.fusion.fused_wavelet import DecomposingWavelet, FusedReconstruction, UpdateNets
from wavelet_lm.fusion.linear import Cast, cast, computing_dtype, rebuilt, shallow_copy
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.stored_model import StoredModel
from wavelet_lm.models.wavelet_lm.block import Block
from wavelet_lm.models.wavelet_lm.ensemble import MultinodalLM
from wavelet_lm.models.wavelet_lm.memory import FastWeightMemory
from wavelet_lm.models.wavelet_lm.model import WaveletLM
from wavelet_lm.roles import uses
from wavelet_lm.transforms.delays import Crawl, Filter
from wavelet_lm.transforms.lifting import LiftingWavelet

# What the weights of a component are kept in, by its name (`COMPONENTS`): weights of one kind can
# be fused into one product.
Precision = Callable[[str], object]
COMPONENTS = (*MIXER_BANDS, "mlp", "lifting", "embedding", "rest")


@torch.no_grad()
def fuse(
    model: LanguageModel | StoredModel,
    dtype: torch.dtype | None = None,
    *,
    adapt: bool = False,
    precision: Precision = lambda component: None,
) -> LanguageModel:
    """The fused model of `model`, which only reads, in eval mode.

    Args:
        model: one that is fused already (a quantized one) is only cast; of one whose weights are
            stored, never more than a part is in memory beside the fused one.
        dtype: of its weights; None keeps the model's. They are fused in the model's own.
        adapt: the fast weights will learn, and the second memories are kept as they are.
        precision: parts of the model that differ in it are not fused.

    Raises:
        UserError: the model was fused with another `adapt`.
    """
    at_hand = _at_hand
    if isinstance(model, StoredModel):
        model, at_hand = model.model, model.at_hand
    if is_fused(model):
        if adapt != model.config.fwpkm_inference_updates:
            given = "--fwpkm_inference_updates" if adapt else "--no_fwpkm_inference_updates"
            raise UserError(
                f"this model was quantized for {'fixed' if adapt else 'learning'} fast weights;"
                f" quantize it again with {given}"
            )
        return cast(model, dtype or computing_dtype(model))
    cast_part = Cast(dtype or next(model.parameters()).dtype)
    fused = _Fusion(cast_part, adapt, precision, at_hand).of(model)
    fused.fused = True
    return fused.eval()


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` made it, or `quantize`: then it only reads."""
    return getattr(model, "fused", False)


def _at_hand(*parts: nn.Module) -> AbstractContextManager[None]:
    """The weights of a model in memory always are."""
    return nullcontext()


class _Fusion:
    """Fuses a model part by part, so that one part of it at a time needs its weights."""

    def __init__(
        self,
        cast: Cast,
        adapt: bool,
        precision: Precision,
        at_hand: Callable[..., AbstractContextManager[None]],
    ):
        self.cast, self.adapt, self.precision, self.at_hand = cast, adapt, precision, at_hand

    def of(self, model: LanguageModel) -> LanguageModel:
        fused = shallow_copy(model)
        fused.config = model.config.replace(fwpkm_inference_updates=self.adapt)
        # What shrinks most is fused first, while little else is in memory.
        parts = ("cells", "wavelets", "blocks")
        if isinstance(model, WaveletLM):
            updates = self._fuse_wavelets(model, fused)
        # Tables and the head together, since they may share a weight.
        rest = {name: part for name, part in model._modules.items() if name not in parts}
        with self.at_hand(*rest.values()):
            fused._modules.update({name: self.cast(part) for name, part in rest.items()})
        if isinstance(model, MultinodalLM):
            fused.cells = nn.ModuleList(map(self.of, model.cells))
        elif isinstance(model, WaveletLM):
            self._fuse_blocks(model, fused, updates)
        else:
            fused.blocks = nn.ModuleList(map(self._cast_alone, model.blocks))
        return fused

    def _cast_alone(self, part: nn.Module) -> nn.Module:
        with self.at_hand(part):
            return self.cast(part)

    def _fuse_wavelets(self, model: WaveletLM, fused: WaveletLM) -> list[UpdateNets | None]:
        """Give `fused` its wavelets; the nets of the reconstructions that can be fused."""
        transform = model.blocks[0].mixer.rotate
        if not FusedMixer.leaves_rotated(model.blocks[0]):
            transform = nn.Identity()
        wavelets, updates = [], []
        for wavelet in model.wavelets:
            with self.at_hand(wavelet):
                new, nets = _fused_wavelet(wavelet, transform)
                wavelets.append(self.cast(new))
                updates.append(None if nets is None else self.cast(nets))
        fused.wavelets = nn.ModuleList(wavelets)
        return updates

    def _fuse_blocks(
        self, model: WaveletLM, fused: WaveletLM, updates: list[UpdateNets | None]
    ) -> None:
        blocks = []
        for i, block in enumerate(model.blocks):
            with self.at_hand(block):
                nets = updates[i % len(updates)]
                blocks.append(self.cast(FusedBlock(block, nets, self.adapt, self.precision)))
        fused.blocks = nn.ModuleList(blocks)


def _fused_wavelet(wavelet: nn.Module, transform: nn.Module) -> tuple[nn.Module, UpdateNets | None]:
    """A wavelet that only reads, and the nets of its reconstruction where that can be fused."""
    fused, nets = rebuilt(wavelet, _fixed_filter), None
    if isinstance(wavelet, LiftingWavelet) and wavelet.is_static:
        nets = UpdateNets(wavelet, transform)
        if wavelet.own_update is None:
            fused.update = nets.decomposing(fused.update)
        fused = DecomposingWavelet(fused)
    return fused, nets


def _fixed_filter(module: nn.Module, _: str) -> nn.Module | None:
    """A crawl as the filter that it has become."""
    return Filter(module.taps().detach(), module.min_lag) if isinstance(module, Crawl) else None


def _learning(module: nn.Module, _: str) -> nn.Module | None:
    """A second memory as one that learns."""
    if not isinstance(module, FastWeightMemory) or module.learns:
        return None
    memory = shallow_copy(module)
    memory.learns = True
    return memory


class FusedBlock(Block):
    """A block whose parts are fused where they can be; its steps are those of `Block`.

    It shares what needs no change with the block that it is made of.
    """

    def __init__(self, block: Block, updates: UpdateNets | None, adapt: bool, precision: Precision):
        """updates: for a reconstruction that can be fused."""
        nn.Module.__init__(self)
        self.pad, self.norm1 = block.pad, block.norm1
        self.embedding_gain = block.embedding_gain
        self.decomposed_norm, self.bypass = block.decomposed_norm, block.bypass
        self.phase_gate = block.phase_gate
        self.delta_memory = None
        if block.delta_memory is not None:
            self.delta_memory = FusedDeltaMemory(block.delta_memory)
        by_scale = [precision(mixer_band(s)) for s in range(len(block.scale_weights))]
        self.mixer = FusedMixer(block, updates is not None, by_scale)
        self.reconstruction, self.projection = None, None
        if updates is None:
            self.projection = block.projection
        else:
            self.reconstruction = FusedReconstruction(updates, block.projection)
        self.spectral_gain, self.feedforward_gain = block.spectral_gain, block.feedforward_gain
        self.feedforward = block.feedforward
        if adapt:
            self.feedforward = rebuilt(block.feedforward, _learning)
        elif block.feedforward is not None:
            apart = precision("mlp") != precision("rest")
            self.feedforward = FusedFeedForward(block.feedforward, apart)

    def with_embedding(self, x: Tensor, embedding: Tensor) -> Tensor:
        return torch.addcmul(x, self.embedding_gain, embedding)

    def mixed_signal(self, parts: list[Tensor], wavelet: nn.Module) -> Tensor:
        mixed = self.mixer(self.phase_gate(*parts))
        if self.reconstruction is not None:
            return self.reconstruction(mixed)
        return self.projection(wavelet.reconstruct(mixed))


def weight_bytes_per_token(model: nn.Module) -> int:
    """Bytes of a model's weights that one token of one text reads, as its modules declare it.

    As often as they are read: blocks may share a wavelet, and a reconstruction that is not fused
    reads the update nets again. Of tables the rows that are read count.
    """
    reads = (use for use in uses(model) if use.parameter is not None)
    return int(sum(use.n_read * use.parameter.element_size() * use.runs.reads for use in reads))


def n_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
