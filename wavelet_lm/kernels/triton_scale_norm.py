"""Triton kernel behind `scale_norm_backward`: each number is read once, each gradient written once.

The compiler makes a kernel for the gradient and others, which read all of it again, for the sums
over the rows. A program here has some rows of one scale, and keeps its part of the sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 2048  # of a tile of rows
WARPS = 4


@triton.jit
def _kernel(
    grad_ptr,  # [S, N, C]
    x_ptr,  # [S, N, C]
    weight_ptr,  # [S, C]
    added_ptr,  # [N, C], or None
    of_x_ptr,  # [S, N, C]
    sums_ptr,  # float32 [programs, 2 or 3, S, C]
    N,
    C,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # a power of two that holds C
):
    part, parts = tl.program_id(0), tl.num_programs(0)
    scale, scales = tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, COLUMNS)
    is_column = column < C
    weight = tl.load(weight_ptr + scale * C + column, mask=is_column, other=0).to(tl.float32)
    of_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_gains = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(part * ROWS, N, parts * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & is_column[None, :]
        at = row.to(tl.int64)[:, None] * C + column[None, :]
        here = scale.to(tl.int64) * N * C + at
        grad = tl.load(grad_ptr + here, mask=inside, other=0).to(tl.float32)
        x = tl.load(x_ptr + here, mask=inside, other=0).to(tl.float32)
        x = tl.where(inside, x - (tl.sum(x, 1) / C)[:, None], 0)
        std_inverse = 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
        normal = x * std_inverse[:, None]
        u = grad * weight[None, :]
        u -= (tl.sum(u, 1) / C)[:, None] + normal * (tl.sum(u * normal, 1) / C)[:, None]
        of_x = (u * std_inverse[:, None]).to(of_x_ptr.dtype.element_ty)
        tl.store(of_x_ptr + here, of_x, mask=inside)
        of_weight += grad * normal
        of_bias += grad
        if added_ptr is not None:
            of_gains += grad * tl.load(added_ptr + at, mask=inside, other=0).to(tl.float32)
    n_sums = 2
    if added_ptr is not None:
        n_sums = 3
    sums_ptr += (part * n_sums * scales + scale) * C + column
    tl.store(sums_ptr, tl.sum(of_weight, 0), mask=is_column)
    tl.store(sums_ptr + scales * C, tl.sum(of_bias, 0), mask=is_column)
    if added_ptr is not None:
        tl.store(sums_ptr + 2 * scales * C, tl.sum(of_gains, 0), mask=is_column)


def tile(C: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps."""
    columns = triton.next_power_of_2(C)
    return max(1, NUMBERS // columns), columns, max(WARPS, min(16, columns // 512))


def launch(
    grad: Tensor, x: Tensor, weight: Tensor, added: Tensor | None, eps: float, parts: int
) -> tuple[Tensor, Tensor]:
    """`scale_norm_backward` on a GPU, in any dtype but float64, with so many parts of the sums.

    grad, x [S, N, C], weight [S, C], added [N, C] or None -> [S, N, C] and [parts, 2 or 3, S, C].
    """
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    S, N, C = x.shape
    of_x = torch.empty_like(x)
    sums = x.new_empty(parts, 2 if added is None else 3, S, C, dtype=torch.float32)
    rows, columns, warps = tile(C)
    with torch.cuda.device_of(x):  # Triton asks for the current device, not for that of x
        _kernel[(parts, S)](
            grad,
            x,
            weight,
            None if added is None else added.contiguous(),
            of_x,
            sums,
            N,
            C,
            eps,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
        )
    return of_x, sums
