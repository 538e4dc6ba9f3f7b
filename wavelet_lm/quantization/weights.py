"""Weights in 8, 4 or 2 bits, and the layers that read them.

8 bits are symmetric with one scale for a row, 4 and 2 bits are packed into bytes with one scale for
a group of a row (`kernels/quantized_matmul.py` has the formats). Scales are bfloat16, rounded up,
so that no weight is further from its level than half a step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wavelet_lm.kernels.quantized_matmul import (
    dequantize,
    fits_cpu_layout,
    pack,
    quantized_matmul,
    quantized_matmul_cpu4,
    to_cpu_layout,
)
from wavelet_lm.kernels.step_matmul import is_step
from wavelet_lm.roles import TABLE, Role

# Elements of value rows that are made at once from their codes.
CHUNK_ELEMENTS = 2**24
# Rows of a matrix in the CPU layout are a multiple of this.
CPU_ROWS = 16


class QuantizedWeight(nn.Module):
    """n matrices [N, K] as codes and scales.

    Args:
        codes, scales: as in `kernels/quantized_matmul.py`.
        K: columns.
        bits: 8, 4 or 2.
        group_size: columns of a scale, below 8 bits.
    """

    keeps_dtype = True

    def __init__(self, codes: Tensor, scales: Tensor, K: int, bits: int, group_size: int):
        super().__init__()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.K, self.bits, self.group_size = K, bits, group_size
        self.n_rows = codes.shape[1]
        self.in_cpu_layout = False

    def matmul(self, x: Tensor) -> Tensor:
        """x [n, ..., T, K], T positions of each text -> [n, ..., T, N], in x's dtype."""
        if self.in_cpu_layout:
            return torch.stack([self.one(i, part) for i, part in enumerate(x)])
        y = quantized_matmul(
            x.flatten(1, -2), self.codes, self.scales, self.bits, self.group_size, is_step(x)
        )
        return y.unflatten(1, x.shape[1:-1])

    def one(self, i: int, x: Tensor) -> Tensor:
        """x [..., T, K] times the i-th matrix alone -> [..., T, N]."""
        rows = x.reshape(-1, self.K)
        if self.in_cpu_layout:
            codes, scales = self.codes[i], self.scales[i]
            y = quantized_matmul_cpu4(rows.contiguous(), codes, scales, self.group_size)
            y = y[:, : self.n_rows]
        else:
            codes, scales = self.codes[i : i + 1], self.scales[i : i + 1]
            size, step = self.group_size, is_step(x)
            y = quantized_matmul(rows[None], codes, scales, self.bits, size, step)[0]
        return y.reshape(*x.shape[:-1], -1)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the only matrix, as numbers: index [...] int64 -> [..., K]."""
        codes, scales = self.codes[0][index], self.scales[0][index]
        flat = dequantize(
            codes.view(1, -1, codes.shape[-1]),
            scales.view(1, -1, scales.shape[-1]),
            self.K,
            self.bits,
            self.group_size,
            dtype,
        )
        return flat.view(*index.shape, self.K)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers, [n, N, K]."""
        return dequantize(self.codes, self.scales, self.K, self.bits, self.group_size, dtype)

    def to_cpu_layout(self) -> None:
        """Let a CPU's own product of 4 bits read the weights; nothing else can then."""
        more = (0, 0, 0, -self.n_rows % CPU_ROWS)  # rows of zeros
        matrices = [
            to_cpu_layout(
                nn.functional.pad(codes, more),
                nn.functional.pad(scales, more),
                self.K,
                self.group_size,
            )
            for codes, scales in zip(self.codes, self.scales, strict=True)
        ]
        codes, scales = zip(*matrices, strict=True)
        self.codes = nn.Parameter(torch.stack(codes), requires_grad=False)
        self.scales = nn.Parameter(torch.stack(scales), requires_grad=False)
        self.in_cpu_layout = True


def quantize_weight(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Every weight of [n, N, K] at the nearest level."""
    n, N, K = weight.shape
    if weight.is_meta:
        size, n_groups = (K, 1) if bits == 8 else (-(-K * bits // 8), -(-K // group_size))
        dtype = torch.int8 if bits == 8 else torch.uint8
        codes = torch.empty(n, N, size, dtype=dtype, device="meta")
        scales = torch.empty(n, N, n_groups, dtype=torch.bfloat16, device="meta")
        return QuantizedWeight(codes, scales, K, bits, group_size)
    groups = grouped(weight.float(), K if bits == 8 else group_size)
    scales = step_sizes(groups, bits)
    levels = nearest(groups, scales, bits).flatten(2)[..., :K]
    codes = levels.to(torch.int8) if bits == 8 else pack(levels.to(torch.uint8), bits)
    return QuantizedWeight(codes, scales.to(torch.bfloat16), K, bits, group_size)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """[..., K] -> [..., groups, group_size], the last group filled with zeros."""
    padding = -weight.shape[-1] % group_size
    return nn.functional.pad(weight, (0, padding)).unflatten(-1, (-1, group_size))


def step_sizes(groups: Tensor, bits: int) -> Tensor:
    """[..., groups, group_size] -> [..., groups]: the least bfloat16 that spans the weights.

    The outermost level is 127 steps from zero with 8 bits, 2^(bits − 1) − ½ with less.
    """
    outermost = 127 if bits == 8 else 2 ** (bits - 1) - 0.5
    exact = groups.abs().amax(-1) / outermost
    rounded = exact.bfloat16()
    up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < exact, up, rounded).float()


def nearest(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The codes (8 bits) or unsigned values (4 and 2) of the levels nearest to the weights.

    groups [..., G, group_size], scales [..., G] -> [..., G, group_size], whole numbers in the dtype
    of `groups`.
    """
    steps = groups / torch.where(scales == 0, 1, scales)[..., None]
    if bits == 8:
        return steps.round().clamp(-127, 127)
    half = 2 ** (bits - 1)
    return (steps + (half - 0.5)).round().clamp(0, 2 * half - 1)


class QuantizedLinear(nn.Module):
    """`nn.Linear` of a quantized weight."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], dtype kept."""
        y = self.weight.one(0, x)
        return y if self.bias is None else y + self.bias


class QuantizedBatchedLinear(nn.Module):
    """A `BatchedLinear` of a quantized weight."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """[n, ..., T, K] -> [n, ..., T, N], dtype kept."""
        y = self.weight.matmul(x)
        return y if self.bias is None else y + self.bias.view(len(x), *[1] * (x.ndim - 2), -1)

    def one(self, i: int, x: Tensor) -> Tensor:
        """The i-th product alone: [..., T, K] -> [..., T, N]."""
        y = self.weight.one(i, x)
        return y if self.bias is None else y + self.bias[i]


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` of a quantized weight; `output_dtype` is that of its vectors."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype):
        super().__init__()
        self.weight, self.output_dtype = weight, dtype
        self.roles = _roles_of_rows(TABLE)

    def forward(self, idx: Tensor) -> Tensor:
        """idx [...] int64 -> [..., C] in `output_dtype`."""
        return self.weight.rows(idx, self.output_dtype)


class QuantizedSubKeys(nn.Module):
    """The `SubKeys` of a memory, quantized."""

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.weight = weight

    def forward(self, q: Tensor) -> Tensor:
        """Halves of queries [B, T, heads, half] -> scores [B, T, heads, n]."""
        return self.weight.matmul(q.permute(2, 0, 1, 3)).permute(1, 2, 0, 3)


class QuantizedValueTable(nn.Module):
    """The `ValueTable` of a memory, quantized; `output_dtype` is that of what it answers.

    role: of the rows, as the table had it.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, role: Role):
        super().__init__()
        self.weight, self.output_dtype = weight, dtype
        self.roles = _roles_of_rows(role)

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Σ_j weights_ij · W[rows_ij], for rows (int64) and weights [N, k] -> [N, C]."""
        n = max(1, CHUNK_ELEMENTS // (rows.shape[1] * self.weight.K))
        sums = [
            torch.bmm(w[:, None], self.weight.rows(r, w.dtype))[:, 0]
            for r, w in zip(rows.split(n), weights.to(self.output_dtype).split(n), strict=True)
        ]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def empty(self, *shape: int) -> Tensor:
        """An empty tensor [*shape, C] like what it answers."""
        size = (*shape, self.weight.K)
        return torch.empty(size, dtype=self.output_dtype, device=self.weight.codes.device)


def _roles_of_rows(role: Role) -> dict[str, Role]:
    return {"weight.codes": role, "weight.scales": role}


def use_cpu_layout(model: nn.Module) -> None:
    """Lay out 4-bit matrices in place for a CPU's own product, which reads no rows of tables."""
    tables = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, (QuantizedEmbedding, QuantizedValueTable))
    }
    for weight in list(model.modules()):
        if (
            isinstance(weight, QuantizedWeight)
            and weight.bits == 4
            and id(weight) not in tables
            and fits_cpu_layout(CPU_ROWS, weight.K, weight.group_size)
        ):
            weight.to_cpu_layout()
