"""Rounding with compensation, for weights of 2 and 4 bits.

GPTQ (Frantar et al., 2023): with H = Σ x xᵀ over what a matrix reads, rounding a column of W costs
least when the columns to its right take up the error, w_j ← w_j − e U_ij / U_ii with e the error of
column i and U the upper Cholesky factor of H⁻¹. Columns are rounded from left to right; a group's
scale is chosen when its first column is reached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavelet_lm.kernels.quantized_matmul import pack
from wavelet_lm.quantization.weights import (
    QuantizedWeight,
    grouped,
    nearest,
    step_sizes,
)

# Columns whose errors compensate for one another, at most: H of more is kept in diagonal blocks.
BLOCK = 4096
DAMPING = 0.01


class InputMoments:
    """H of the n matrices of a product, [K, K] each, in diagonal blocks of `BLOCK` columns."""

    def __init__(self, n: int):
        self.n = n
        self.blocks: list[Tensor] = []

    def add(self, x: Tensor, first: int = 0) -> None:
        """Inputs [m, M, K] of the m matrices from `first` on."""
        parts = x.float().split(BLOCK, dim=-1)
        if not self.blocks:
            self.blocks = [p.new_zeros(self.n, p.shape[-1], p.shape[-1]) for p in parts]
        for total, part in zip(self.blocks, parts, strict=True):
            total[first : first + len(x)].baddbmm_(part.mT, part)


def quantize_compensated(
    weight: Tensor, bits: int, group_size: int, moments: InputMoments
) -> QuantizedWeight:
    """[n, N, K] in 2 or 4 bits, with the least error of its products by what GPTQ knows."""
    K = weight.shape[2]
    parts = [[], []]
    for columns, H in zip(weight.float().split(BLOCK, dim=-1), moments.blocks, strict=True):
        results = [_compensated(W, h, bits, group_size) for W, h in zip(columns, H, strict=True)]
        for part, tensors in zip(parts, zip(*results, strict=True), strict=True):
            part.append(torch.stack(tensors))
    levels, scales = (torch.cat(part, -1) for part in parts)
    codes = pack(levels.to(torch.uint8), bits)
    return QuantizedWeight(codes, scales.to(torch.bfloat16), K, bits, group_size)


def _compensated(W: Tensor, H: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Levels [N, K] and scales [N, groups] of one block of columns."""
    W = W.clone()
    U = _inverse_factor(H)
    levels, scales = torch.empty_like(W), []
    for start in range(0, W.shape[1], group_size):
        here = slice(start, min(start + group_size, W.shape[1]))
        group, factor = W[:, here], U[here, here]
        scales.append(step_sizes(grouped(group, group_size), bits))
        errors = torch.empty_like(group)
        for i in range(group.shape[1]):
            column = group[:, i, None]
            levels[:, start + i] = nearest(column, scales[-1][:, 0], bits)[:, 0]
            value = (levels[:, start + i] - (2 ** (bits - 1) - 0.5)) * scales[-1][:, 0]
            errors[:, i] = (column[:, 0] - value) / factor[i, i]
            group[:, i + 1 :] -= errors[:, i, None] * factor[i, i + 1 :]
        W[:, here.stop :] -= errors @ U[here, here.stop :]
    return levels, torch.cat(scales, -1)


def _inverse_factor(H: Tensor) -> Tensor:
    """U with H⁻¹ = Uᵀ U, upper triangular; inputs that never occurred cost nothing."""
    H = H.double()
    diagonal = H.diagonal()
    damping = DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
    H = H + damping * torch.eye(len(H), dtype=H.dtype, device=H.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(inverse, upper=True).float()
