"""The delta memory of a fused model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from wavelet_lm.fusion.linear import FusedLinear
from wavelet_lm.models.wavelet_lm.delta_memory import DeltaMemory


class FusedDeltaMemory(DeltaMemory):
    """A `DeltaMemory` whose matrices of one input are one matrix."""

    def __init__(self, memory: DeltaMemory):
        nn.Module.__init__(self)
        self.heads, self.key_dim = memory.heads, memory.key_dim
        self.value_dim, self.n_bands = memory.value_dim, memory.n_bands
        self.activation = memory.activation
        self.after_mixing, self.norm = memory.after_mixing, memory.norm
        self.norm_weight, self.out = memory.norm_weight, memory.out
        self.dropout = nn.Identity()
        self.keys = FusedLinear.of(torch.cat((memory.query.weight, memory.key.weight)), None)
        parts = (memory.value, memory.gate, memory.rates)
        weight = torch.cat([part.weight for part in parts])
        bias = pad(memory.rates.bias, (len(weight) - len(memory.rates.bias), 0))
        self.values = FusedLinear.of(weight, bias)

    def queries_and_keys(self, features: Tensor) -> Tensor:
        return self.keys(features)

    def values_and_gates(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.heads * self.value_dim
        return self.values(h).split((n, n, 2 * self.heads), -1)
