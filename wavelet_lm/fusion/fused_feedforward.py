"""What acts on single positions in a fused model: MLP and product-key memories.

The second norm's gain and bias and the learned factors move into the matrices beside them, what
reads the same input is one product, and a memory's query and sub-keys become one matrix where that
is smaller. As in all of a fused model, the trained modules are left as they are, and every matrix
is a module of `linear.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from wavelet_lm.fusion.linear import FusedLinear, shallow_copy, steps_in_one_launch
from wavelet_lm.kernels.product_keys import product_key_read_in_one
from wavelet_lm.kernels.step_matmul import is_step
from wavelet_lm.models.wavelet_lm.block import FeedForward
from wavelet_lm.models.wavelet_lm.layers import Gain
from wavelet_lm.models.wavelet_lm.memory import ProductKeyMemory, ValueTable
from wavelet_lm.roles import declared


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
            self.activation = branches["mlp"].activation
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
        shapes = {(m.memory.heads, m.memory.num_keys, m.memory.top_k) for m in self.memories}
        self.memories_are_alike = len(shapes) == 1
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
                h = matrix(self.activation(h.contiguous() if is_step(h) else h))
            total = h
        scores = [branch.scores(next(parts)) for branch in self.memories]
        if self.memories and steps_in_one_launch(x) and self._has_tables(x.dtype):
            return total + self._read_in_one_launch(scores).view_as(x), memory
        if len(scores) > 1 and self.memories_are_alike:
            # The rows to read are looked for in all of them at once.
            together = self.memories[0].memory.plan(torch.stack(scores, 2))
            plans = list(zip(*(part.unbind(2) for part in together), strict=True))
        else:
            plans = [m.memory.plan(s) for m, s in zip(self.memories, scores, strict=True)]
        for branch, plan in zip(self.memories, plans, strict=True):
            total = total + branch(*plan)
        return total, memory

    def _has_tables(self, dtype: torch.dtype) -> bool:
        """Whether the values of all memories are plain tables of this dtype."""
        tables = [branch.memory.values for branch in self.memories]
        return all(type(t) is ValueTable and t.weight.dtype == dtype for t in tables)

    def _read_in_one_launch(self, scores: list[Tensor]) -> Tensor:
        """The sum of what the memories answer for scores [1, 1, heads, 2, √num_keys], [C].

        That is one launch, or one of each of them where their shapes differ.
        """
        pairs = list(zip(self.memories, scores, strict=True))
        total: Tensor | int = 0
        for group in [pairs] if self.memories_are_alike else [[pair] for pair in pairs]:
            memories = [branch.memory for branch, _ in group]
            first = memories[0]
            answers = product_key_read_in_one(
                [own[0, 0] for _, own in group],
                [memory.values.weight for memory in memories],
                first.ranks_a,
                first.ranks_b,
                *first.lookup,
            )
            for (branch, _), answer in zip(group, answers, strict=True):
                total = total + branch.gain(answer)
        return total


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
        """The matrix [rows, C] whose product `scores` takes."""
        Q = memory.query.weight
        if not self.gives_scores:
            return Q
        halves = Q.view(memory.heads, 2, -1, Q.shape[1])
        # [heads, 2, √num_keys, half]
        keys = torch.stack((memory.keys_a.weight, memory.keys_b.weight), 1)
        return (keys @ halves).reshape(-1, Q.shape[1])

    def scores(self, x: Tensor) -> Tensor:
        """The product with `input_weight`, [B, T, rows] -> [B, T, heads, 2, √num_keys]."""
        if self.gives_scores:
            return x.view(*x.shape[:2], self.memory.heads, 2, self.memory.n_subkeys)
        return self.memory.scores(x)

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """What is read by a plan, rows int64 and weights [B, T, heads, top_k] -> [B, T, C]."""
        return self.memory.read(rows, self.gain(weights))
