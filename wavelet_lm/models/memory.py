"""Product-key memory (Lample et al., 2019, "Large Memory Layers with Product Keys").

A key of the memory is a pair of sub-keys (i, j), its score the sum of two sub-scores. The best of
N = n² keys are found among the best of 2n sub-keys, and only their value rows are read.
"""

import math

import torch
from torch import Tensor, nn

KEY_NOISE = 0.02


class ProductKeyMemory(nn.Module):
    """Sparse reads from `heads · num_keys` value rows of width C.

    Args:
        C: channels, divisible by 2 · heads.
        num_keys: value rows per head, a square number.
        top_k: rows read per position and head.
        heads: independent queries, whose results are summed.
    """

    def __init__(self, C: int, num_keys: int, top_k: int, heads: int):
        super().__init__()
        self.heads, self.num_keys = heads, num_keys
        self.n_subkeys = math.isqrt(num_keys)
        self.n_best = min(top_k, self.n_subkeys)
        self.top_k = min(top_k, self.n_best**2)
        half = C // (2 * heads)
        self.query = nn.Linear(C, C, bias=False)
        self.keys_a = nn.Parameter(torch.randn(heads, self.n_subkeys, half) * KEY_NOISE)
        self.keys_b = nn.Parameter(torch.randn(heads, self.n_subkeys, half) * KEY_NOISE)
        self.values = nn.Parameter(torch.randn(heads * num_keys, C) * KEY_NOISE)
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
        B, T, C = x.shape
        rows, weights = self.read_plan(x)
        weights = weights.reshape(B * T, -1).to(self.values.dtype)
        y = nn.functional.embedding_bag(
            rows.reshape(B * T, -1), self.values, mode="sum", per_sample_weights=weights
        )
        return y.view(B, T, C)

    def read_plan(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which value rows each position reads, and with which weights.

        Returns:
            rows [B, T, heads, top_k] int64 into `values`, and weights of the same shape, a softmax
            over top_k per head (in float32 at least).
        """
        B, T, _ = x.shape
        q = self.query(x).view(B, T, self.heads, 2, -1)
        best_a, index_a = self._best(q[..., 0, :], self.keys_a)
        best_b, index_b = self._best(q[..., 1, :], self.keys_b)
        candidates = best_a[..., self.ranks_a] + best_b[..., self.ranks_b]
        scores, chosen = candidates.topk(self.top_k)
        rows = (index_a[..., self.ranks_a] * self.n_subkeys + index_b[..., self.ranks_b]).gather(
            -1, chosen
        )
        head_offset = torch.arange(self.heads, device=x.device)[:, None] * self.num_keys
        wide = scores if scores.dtype == torch.float64 else scores.float()
        return rows + head_offset, wide.softmax(-1)

    def _best(self, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Best sub-keys of half queries [B, T, heads, half], sorted: scores and indices."""
        return torch.einsum("bthd,hnd->bthn", q, keys).topk(self.n_best)
