"""A model that is watched while it reads: what its blocks mix, gate and look up.

The model is fused, so that one form of it need be watched, and copied: the copy shares the weights,
and what watches it sees and changes nothing of another reader's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm.errors import UserError
from wavelet_lm.fusion.fuse import FusedBlock, fuse, is_fused
from wavelet_lm.fusion.linear import rebuilt
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.wavelet_lm.delta_memory import DeltaMemory
from wavelet_lm.models.wavelet_lm.memory import ProductKeyMemory
from wavelet_lm.models.wavelet_lm.model import WaveletLM
from wavelet_lm.scope.recall import shares
from wavelet_lm.transforms.dtypes import wide

# The share of a gate's input z that its activation lets through: φ(z) = z · share, or the share
# itself where φ is a sigmoid.
SHARE_LET_THROUGH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.sigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": torch.special.ndtr,
    "relu": lambda z: (z > 0).to(z.dtype),
}


@dataclass
class Recall:
    """What a delta memory found (`recall.py`), and how much it wrote and kept.

    shares: [heads, T, T]; before: [heads, T]; written: β, and kept: α, each [heads, T].
    """

    shares: Tensor
    before: Tensor
    written: Tensor
    kept: Tensor


@dataclass
class Slots:
    """The value rows that a product-key memory read, and their shares of it: each [T, n].

    name: PKM or FwPKM; n_rows: of its table.
    """

    name: str
    n_rows: int
    rows: Tensor
    shares: Tensor


@dataclass
class Run:
    """What one run of a block did at T positions of a text.

    energy: Σ_c of the squares of the mixed bands, each times its scale's weight, [S, T];
    openness: the mean share that the mixers' gates let through, [S, T], None without gates.
    """

    energy: Tensor
    openness: Tensor | None = None
    recall: Recall | None = None
    slots: list[Slots] = field(default_factory=list)


def check_scales(model: nn.Module, source: str = "this model") -> None:
    """Raise `UserError` where a model has no wavelet blocks; `source` says whose it is."""
    networks = model.networks() if isinstance(model, LanguageModel) else []
    if not networks or not all(isinstance(network, WaveletLM) for network in networks):
        name = getattr(getattr(model, "config", None), "model", type(model).__name__)
        raise UserError(
            f"{source}: a {name} has no scales to look at; give a language model wavelet_lm"
        )


class Watched:
    """A model of wavelet blocks that is read by one text, and what its blocks do with it.

    Args:
        model: fused or not; left as it is.

    Attributes:
        model: the copy that is watched.
        networks: those that it consists of, one but for ensembles.
        silenced: (network, run, scale), whose mixed band is zero, or None.

    Raises:
        UserError: it has no wavelet blocks.
    """

    def __init__(self, model: nn.Module):
        check_scales(model)
        fused = model if is_fused(model) else fuse(model)
        self.model = rebuilt(fused, lambda part, name: None)
        self.networks: list[WaveletLM] = self.model.networks()
        self.silenced: tuple[int, int, int] | None = None
        self._runs: list[list[Run]] = [[] for _ in self.networks]
        self._looks = False
        for n, network in enumerate(self.networks):
            for block in network.blocks:
                self._watch(n, network, block)

    def read(self, idx: Tensor, state: Any, *, look: bool) -> tuple[Tensor, Any]:
        """Vectors [1, T, H] ready for the head, for tokens idx [1, T] int64, and the state.

        look: whether `runs` is wanted.
        """
        self._runs, self._looks = [[] for _ in self.networks], look
        return self.model.hidden(idx, state)

    @property
    def runs(self) -> list[list[Run]]:
        """What the last `read` saw: of every network one a run of a block, in their order."""
        return self._runs

    def _watch(self, n: int, network: WaveletLM, block: FusedBlock) -> None:
        let_through = SHARE_LET_THROUGH[network.config.mixer_gate_activation]
        n_scales = network.config.n_scales

        def begin(*_: Any) -> None:
            self._runs[n].append(Run(energy=torch.empty(0)))

        def see_mixed(_: nn.Module, __: Any, mixed: Tensor) -> Tensor | None:
            runs = self._runs[n]
            if self._looks:
                runs[-1].energy = wide(mixed[:, 0]).square().sum(-1)
            if self.silenced is not None and self.silenced[:2] == (n, len(runs) - 1):
                mixed = mixed.clone()
                mixed[self.silenced[2]] = 0
            return mixed

        def see_gate(scales: list[int]) -> Callable[..., None]:
            def see(_: nn.Module, __: Any, z: Tensor) -> None:
                if self._looks:
                    run = self._runs[n][-1]
                    if run.openness is None:
                        run.openness = wide(z).new_zeros(n_scales, z.shape[2])
                    run.openness[scales] = let_through(wide(z[:, 0])).mean(-1)

            return see

        def see_recall(memory: DeltaMemory, inputs: tuple[Any, ...]) -> None:
            if self._looks:
                x, bands, state = inputs
                given, _ = memory.rule_inputs(x, bands)
                before = None if state is None else memory.matrices(state, given)
                rates = given.beta[0].T, given.log_decay[0].exp().T
                self._runs[n][-1].recall = Recall(*shares(given, before), *rates)

        def see_slots(memory: ProductKeyMemory) -> Callable[..., None]:
            def see(_: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
                if self._looks:
                    rows, weights = inputs  # of B · T positions, B = 1
                    total = wide(weights).sum(-1, keepdim=True)
                    share = wide(weights) / total.where(total != 0, 1)
                    slots = Slots(memory.component, memory.n_rows, rows, share)
                    self._runs[n][-1].slots.append(slots)

            return see

        block.register_forward_pre_hook(begin)
        mixers = block.mixer.scales
        for scales, group in zip(mixers.scales, mixers.groups, strict=True):
            if group.gate is not None:
                group.gate.register_forward_hook(see_gate(scales))
        block.mixer.register_forward_hook(see_mixed)
        if block.delta_memory is not None:
            block.delta_memory.register_forward_pre_hook(see_recall)
        for part in block.modules():
            if isinstance(part, ProductKeyMemory):
                part.values.register_forward_pre_hook(see_slots(part))
