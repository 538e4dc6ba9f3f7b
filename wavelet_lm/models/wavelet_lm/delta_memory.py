"""A memory that recalls: a matrix per head, written and read by the gated delta rule.

The running mean and the bands summarise what came; this memory looks a detail up in it. What it
reads is the wavelet's: a fine detail already holds the present beside its past, so that a key can
be what came before and a value what came then.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid, normalize, rms_norm, silu

from wavelet_lm.config import ModelConfig
from wavelet_lm.kernels.delta_rule import delta_rule
from wavelet_lm.models.wavelet_lm.mlp import OUTPUT_GAIN
from wavelet_lm.roles import VECTOR
from wavelet_lm.transforms.dropout import Dropout
from wavelet_lm.transforms.dtypes import as_factor, wide
from wavelet_lm.transforms.history import Ring, carried
from wavelet_lm.transforms.lifting import is_plain

EPSILON = 1e-5


class RuleInputs(NamedTuple):
    """What the rule gets at T positions, at least float32: keys and queries of length 1.

    q, k: [B, T, heads, dk]; v: [B, T, heads, dv]; log_decay, beta: [B, T, heads].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor


class PairProducts(nn.Module):
    """φ(x) with φ(x)ᵀ φ(y) = (xᵀ y)²: a number's square, and √2 times the product of any two."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d (d + 1) / 2]."""
        d = x.shape[-1]
        twice = math.sqrt(2) * x
        pairs = [twice * x.roll(-lag, -1) for lag in range(1, (d + 1) // 2)]
        if d % 2 == 0:  # those half a turn apart would come twice
            pairs.append(twice[..., : d // 2] * x[..., d // 2 :])
        return torch.cat((x * x, *pairs), -1)


ACTIVATIONS = {"silu": nn.SiLU, "identity": nn.Identity, "square": PairProducts}


class DeltaMemory(nn.Module):
    """out = W_o (rms_norm(y) ⊙ silu(W_g h)), where y is what the memory answers.

        q, k = silu(W f) per head, each of length 1;  v = W_v h
        β = σ(…h…),  α = σ(…h…)                                    gate and decay, one a head
        u = β (v − α Sᵀ k);  S ← α S + k uᵀ;  y = Sᵀ q             the gated delta rule

    h [B, T, C] is the block's normalised input or, with `delta_after_mixing`, LN of the signal that
    the mixed scales were added to; f = [h, d_0, …] the same beside the finest `delta_bands` details
    of the block's input. The rule is that of Yang, Kautz and Hatamizadeh (2024), "Gated Delta
    Networks"; it runs in float32 at least. With `delta_activation` identity q and k are W f: keys
    that silu made are nearly positive and so alike, and one memory holds fewer of them. With square
    they are the `PairProducts` of W f: keys of dk (dk + 1) / 2 numbers, whose likeness is the
    square of what it was, so that what is a little alike is nearly at a right angle. W_o starts at
    0.02 of torch's default, as the MLP's last matrix does.
    """

    component = "delta memory"
    # Gates and decays are added up in float32: a head that forgets 1 in 10,000 needs its digits.
    roles: ClassVar = {"rates.bias": VECTOR}

    def __init__(self, config: ModelConfig):
        super().__init__()
        C = config.C
        self.heads, dk = config.delta_heads, config.delta_key_dim
        self.key_dim = dk * (dk + 1) // 2 if config.delta_activation == "square" else dk
        self.value_dim, self.n_bands = config.delta_value_dim, config.delta_bands
        n_keys, n_values = self.heads * dk, self.heads * self.value_dim
        n_features = C + self.n_bands * config.padded_channels
        self.activation = ACTIVATIONS[config.delta_activation]()
        self.after_mixing = config.delta_after_mixing
        self.norm = nn.LayerNorm(C) if self.after_mixing else nn.Identity()
        self.query = nn.Linear(n_features, n_keys, bias=False)
        self.key = nn.Linear(n_features, n_keys, bias=False)
        self.value = nn.Linear(C, n_values, bias=False)
        self.gate = nn.Linear(C, n_values, bias=False)
        self.rates = nn.Linear(C, 2 * self.heads)  # of β, then of α
        self.norm_weight = nn.Parameter(torch.ones(self.value_dim))
        self.out = nn.Linear(n_values, C, bias=False)
        self.dropout = Dropout(config.dropout_projection)
        # What the state knows of k, what is written, what q reads.
        self.n_products = 3 * self.heads * self.key_dim * self.value_dim
        with torch.no_grad():
            self.out.weight.mul_(OUTPUT_GAIN)
            self.rates.bias[: self.heads] = 0
            # A head of horizon n keeps 1 − 1/n of what it has: σ(log(n − 1)).
            first, last = (math.log(n - 1) for n in config.delta_horizons)
            self.rates.bias[self.heads :] = torch.linspace(first, last, self.heads)

    @torch.no_grad()
    def start_with(self, past_by_detail: tuple[float, float] | None) -> None:
        """Start as an induction head: a key is the query of one position before.

        So what is recalled before anything is trained is what followed the last time that such a
        token came. From unrelated queries and keys it takes hundreds of steps to get there.

        past_by_detail: (a, b) such that h one position back is near a h + b d_0; None if no band
            is d_0, which leaves queries and keys random.
        """
        if past_by_detail is None or self.n_bands == 0:
            return
        a, b = past_by_detail
        C = self.value.in_features
        self.query.weight[:, C:] = 0
        query = self.query.weight[:, :C]
        self.key.weight.zero_()
        self.key.weight[:, :C] = a * query
        self.key.weight[:, C : 2 * C] = b * query

    def forward(
        self, x: Tensor, bands: list[Tensor], state: Tensor | Ring | None = None
    ) -> tuple[Tensor, Tensor | Ring]:
        """Recall for a text or its next chunk, and remember it.

        Args:
            x: [B, T, C], normalised already or, with `delta_after_mixing`, the residual stream.
            bands: of the decomposition, coarse to fine, each [B, T, Cp].
            state: what an earlier call returned; None starts a text.

        Returns:
            [B, T, C] in x's dtype, and the state [B, heads · key_dim · dv], at least float32.
        """
        inputs, gate = self.rule_inputs(x, bands)
        if state is None:
            state = inputs.v.new_zeros(len(x), self.heads * self.key_dim * self.value_dim)
        scan = carried(state)
        place = scan.place(inputs.v.dtype)
        y, states = delta_rule(
            *inputs,
            self.matrices(scan.before(), inputs),
            every=1 if scan.keeps_every else None,
            into=None if place is None else self.matrices(place[:, 0], inputs)[:, None],
        )
        normal = rms_norm(y, y.shape[-1:], eps=EPSILON).to(gate.dtype) * self.norm_weight
        y = normal.flatten(2) * silu(gate)
        return self.dropout(self.out(y)), scan.after(states.flatten(2))

    def matrices(self, state: Tensor, inputs: RuleInputs) -> Tensor:
        """A state [B, heads · key_dim · dv] as [B, heads, key_dim, dv], in the inputs' dtype."""
        state = state.to(inputs.v.dtype)
        return state.view(len(state), self.heads, self.key_dim, self.value_dim)

    def rule_inputs(self, x: Tensor, bands: list[Tensor]) -> tuple[RuleInputs, Tensor]:
        """What the rule gets of x [B, T, C] and its bands; the gate W_g h [B, T, heads · dv]."""
        h = self.norm(x)
        read = (h, *reversed(bands[len(bands) - self.n_bands :]))
        features = torch.cat([as_factor(part) for part in read], -1)
        q, k = self.queries_and_keys(features).unflatten(-1, (2, self.heads, -1)).unbind(2)
        v, gate, rates = self.values_and_gates(h)
        beta, decay = wide(rates).split(self.heads, -1)
        inputs = RuleInputs(
            normalize(self.activation(wide(q)), dim=-1),
            normalize(self.activation(wide(k)), dim=-1),
            wide(v).unflatten(-1, (self.heads, -1)),
            logsigmoid(decay),
            beta.sigmoid(),
        )
        return inputs, gate

    def queries_and_keys(self, features: Tensor) -> Tensor:
        """[B, T, C + n Cp] -> [B, T, 2 · heads · dk], in one product."""
        if not (is_plain(self.query) and is_plain(self.key)):
            return torch.cat((self.query(features), self.key(features)), -1)
        return linear(features, torch.cat((self.query.weight, self.key.weight)))

    def values_and_gates(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, C] -> v and its gate [B, T, heads · dv] and the rates [B, T, 2 · heads]."""
        if not all(map(is_plain, (self.value, self.gate, self.rates))):
            return self.value(h), self.gate(h), self.rates(h)
        weights = torch.cat((self.value.weight, self.gate.weight, self.rates.weight))
        n = self.heads * self.value_dim
        v, gate, rates = linear(h, weights).split((n, n, 2 * self.heads), -1)
        return v, gate, rates + self.rates.bias
