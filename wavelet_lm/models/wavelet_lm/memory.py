"""Product-key memory (Lample et al., 2019, "Large Memory Layers with Product Keys").

A key of the memory is a pair of sub-keys (i, j), its score the sum of two sub-scores. The best of
N = n² keys are found among the best of 2n sub-keys, and only their value rows are read.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map

from wavelet_lm.kernels.product_keys import Lookup, product_key_plan
from wavelet_lm.roles import FACTOR, Role

KEY_NOISE = 0.02


class FastWeights(NamedTuple):
    """What a text has added to the values of a memory, for each row of a batch.

    rows: [B, N] int64, the value rows that changed, sorted and padded with the number of rows;
    deltas: [B, N, C], what to add to them; recent: [B, m, C], the inputs since the last update, or
    None while they are read and do not learn.
    """

    rows: Tensor
    deltas: Tensor
    recent: Tensor | None


class ProductKeyMemory(nn.Module):
    """Sparse reads from `heads · num_keys` value rows of width C.

    Args:
        C: channels, divisible by 2 · heads.
        num_keys: value rows per head, a square number.
        top_k: rows read per position and head.
        heads: independent queries, whose results are summed.
    """

    component = "PKM"

    def __init__(self, C: int, num_keys: int, top_k: int, heads: int):
        super().__init__()
        self.heads, self.num_keys = heads, num_keys
        self.n_rows = heads * num_keys
        self.n_subkeys = math.isqrt(num_keys)
        self.n_best = min(top_k, self.n_subkeys)
        self.top_k = min(top_k, self.n_best**2)
        half = C // (2 * heads)
        self.query = nn.Linear(C, C, bias=False)
        self.keys_a = SubKeys(heads, self.n_subkeys, half)
        self.keys_b = SubKeys(heads, self.n_subkeys, half)
        self.values = ValueTable(self.n_rows, C, self.heads * self.top_k)
        # With both halves sorted, the pair at ranks (i, j) is beaten or matched by all pairs at
        # ranks (≤ i, ≤ j): only pairs with (i + 1)(j + 1) ≤ top_k can be among the best top_k.
        pairs = [
            (i, j)
            for i in range(self.n_best)
            for j in range(self.n_best)
            if (i + 1) * (j + 1) <= self.top_k
        ]
        for name, ranks in zip(("ranks_a", "ranks_b"), zip(*pairs, strict=True), strict=True):
            self.register_buffer(name, torch.tensor(ranks), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C], in the dtype of the values."""
        return self.read(*self.read_plan(x))

    def read(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of value rows, [B, T, C], for a plan of int64 [B, T, heads, top_k]."""
        B, T = rows.shape[:2]
        return self.values(rows.reshape(B * T, -1), weights.reshape(B * T, -1)).view(B, T, -1)

    def read_plan(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which value rows each position reads, and with which weights.

        Returns:
            rows [B, T, heads, top_k] int64 into `values`, and weights of the same shape, a softmax
            over top_k per head (in float32 at least).
        """
        return self.plan(self.scores(self.query(x)))

    def scores(self, q: Tensor) -> Tensor:
        """Scores of all sub-keys for queries [B, T, C]: [B, T, heads, 2, √num_keys]."""
        if self.training and torch.compiler.is_compiling() and q.is_cuda:
            return self.scores_at_once(q)
        a, b = q.view(*q.shape[:2], self.heads, 2, -1).unbind(3)
        return torch.stack((self.keys_a(a), self.keys_b(b)), 3)

    def scores_at_once(self, q: Tensor) -> Tensor:
        """`scores` of [B, T, C] in one product with all keys, and zeros where a half is not theirs.

        Half of what is multiplied at least is zero, but it is little, and nothing is copied to put
        the halves apart.
        """
        keys = torch.stack((self.keys_a.weight, self.keys_b.weight), 1).flatten(0, 1)
        scores = nn.functional.linear(q, torch.block_diag(*keys.unbind()))
        return scores.view(*q.shape[:2], self.heads, 2, -1)

    def plan(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """`read_plan` from the scores of the sub-keys, [..., heads, 2, √num_keys].

        Returns rows [..., heads, top_k] int64, and weights of this shape in float32 at least.
        """
        return product_key_plan(scores, self.ranks_a, self.ranks_b, self.lookup)

    @property
    def lookup(self) -> Lookup:
        """The sizes of its lookup."""
        return Lookup(self.n_best, self.top_k, self.num_keys)


class SubKeys(nn.Module):
    """The n sub-keys of one half of the channels, per head: `weight` [heads, n, half]."""

    roles: ClassVar = {"weight": FACTOR}

    def __init__(self, heads: int, n: int, half: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, n, half) * KEY_NOISE)

    def forward(self, q: Tensor) -> Tensor:
        """Halves of queries [B, T, heads, half] -> scores [B, T, heads, n]."""
        return torch.einsum("bthd,hnd->bthn", q, self.weight)


class ValueTable(nn.Module):
    """What a memory can answer: `weight` [n_rows, C], of which a position reads `n_read` rows."""

    def __init__(self, n_rows: int, C: int, n_read: int):
        super().__init__()
        self.roles = {"weight": Role(rows=n_read)}
        self.weight = nn.Parameter(torch.randn(n_rows, C) * KEY_NOISE)

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Σ_j weights_ij · weight[rows_ij], for rows (int64) and weights [N, k] -> [N, C]."""
        weights = weights.to(self.weight.dtype)
        if torch.compiler.is_exporting():  # other programs have no such operator
            return (weights[..., None] * self.weight[rows]).sum(1)
        return nn.functional.embedding_bag(
            rows, self.weight, mode="sum", per_sample_weights=weights
        )

    def empty(self, *shape: int) -> Tensor:
        """An empty tensor [*shape, C] like the rows that are read."""
        return self.weight.new_empty(*shape, self.weight.shape[1])


class FastWeightMemory(ProductKeyMemory):
    """FwPKM: a product-key memory whose values adapt to the text that is being generated.

    After every `chunk_size` tokens the deltas take one gradient step of size `update_lr` on

        1/((n − 1) C) Σ_t |memory(h_t) − h_{t+1}|²,   t over the chunk's n − 1 pairs,

    with the read weights held fixed. The gradient has a closed form: row r changes by the sum over
    its reads (t, j) of −update_lr · w_tj · 2 (memory(h_t) − h_{t+1}) / ((n − 1) C). In training,
    and where `learns` is false, it is a plain product-key memory without a state.

    What is read teaches nothing: a new state rests, and `learning` and `resting` change that.
    """

    component = "FwPKM"

    def __init__(
        self,
        C: int,
        num_keys: int,
        top_k: int,
        heads: int,
        update_lr: float,
        chunk_size: int,
        learns: bool,
    ):
        super().__init__(C, num_keys, top_k, heads)
        self.update_lr, self.chunk_size, self.learns = update_lr, chunk_size, learns

    def read_text(self, x: Tensor, state: FastWeights | None) -> tuple[Tensor, FastWeights | None]:
        """Read for [B, T, C], the next tokens of a text: [B, T, C], and the state after them."""
        if self.training or not self.learns:
            return self(x), state
        return self.adapt(x, self.fresh_state(len(x)) if state is None else state)

    def fresh_state(self, B: int) -> FastWeights:
        """No deltas yet, for B texts."""
        nothing = self.values.empty(B, 0)
        rows = torch.empty(B, 0, dtype=torch.int64, device=nothing.device)
        return FastWeights(rows, nothing, None)

    def adapt(self, x: Tensor, state: FastWeights) -> tuple[Tensor, FastWeights]:
        """Read for x [B, T, C], the next tokens of a text, and learn after every chunk of them."""
        if state.recent is None:
            return self.read_adapted(x, state), state
        parts = []
        while x.shape[1]:
            n_left = self.chunk_size - state.recent.shape[1]
            piece, x = x[:, :n_left], x[:, n_left:]
            parts.append(self.read_adapted(piece, state))
            recent = torch.cat((state.recent, piece.to(state.recent.dtype)), 1)
            state = state._replace(recent=recent)
            if piece.shape[1] == n_left:
                state = self.updated(state)
        return torch.cat(parts, 1), state

    def read_adapted(self, x: Tensor, state: FastWeights) -> Tensor:
        """The memory with its deltas: [B, T, C] -> [B, T, C]."""
        rows, weights = self.read_plan(x)
        y = self.read(rows, weights)
        if state.rows.shape[1] == 0:
            return y
        B, T = x.shape[:2]
        wanted = rows.reshape(B, -1)
        place = torch.searchsorted(state.rows, wanted).clamp(max=state.rows.shape[1] - 1)
        found = state.rows.gather(1, place) == wanted
        weights = (weights.reshape(B, -1) * found).to(y.dtype)
        deltas = state.deltas.gather(1, place[..., None].expand(-1, -1, y.shape[-1]))
        return y + (weights[..., None] * deltas).view(B, T, -1, y.shape[-1]).sum(2)

    @torch.no_grad()
    def updated(self, state: FastWeights) -> FastWeights:
        """The state after one step on its recent inputs."""
        inputs, targets = state.recent[:, :-1], state.recent[:, 1:]
        rows, weights = self.read_plan(inputs)
        error = self.read_adapted(inputs, state) - targets
        step = -self.update_lr * 2 / targets[0].numel() * error
        changes = weights.flatten(2).to(step.dtype)[..., None] * step[:, :, None]  # [B, n−1, K, C]
        new = [
            merge_rows(torch.cat((old_rows, r.flatten())), torch.cat((old, c.flatten(0, 1))))
            for old_rows, old, r, c in zip(state.rows, state.deltas, rows, changes, strict=True)
        ]
        return FastWeights(
            pad_sequence([r for r, _ in new], True, padding_value=self.n_rows),
            pad_sequence([deltas for _, deltas in new], True),
            state.recent[:, :0],
        )


def learning(state: Any) -> Any:
    """A model's state whose fast weights learn from now on, where it has any."""
    return _with_fast_weights(
        state, lambda w: w if w.recent is not None else w._replace(recent=w.deltas[:, :0])
    )


def resting(state: Any) -> Any:
    """A model's state whose fast weights are read and learn nothing, for a prompt that follows."""
    return _with_fast_weights(state, lambda weights: weights._replace(recent=None))


def _with_fast_weights(state: Any, change: Callable[[FastWeights], FastWeights]) -> Any:
    def is_ours(node: Any) -> bool:
        return isinstance(node, FastWeights)

    return tree_map(lambda leaf: change(leaf) if is_ours(leaf) else leaf, state, is_leaf=is_ours)


def merge_rows(rows: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted distinct rows [M] int64 and the sums of their deltas [M, C]."""
    distinct, place = rows.unique(return_inverse=True)
    summed = deltas.new_zeros(len(distinct), deltas.shape[1]).index_add_(0, place, deltas)
    return distinct, summed
