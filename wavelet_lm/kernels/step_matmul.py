"""x Wᵀ for a step of decoding: every row of x is the next position of a text of its own.

A text must not depend on which texts are written beside it, but the libraries below torch choose
how a sum is cut by the number of rows. On a CPU in bfloat16 the choice is ours: oneDNN computes up
to `ROW_TILE` rows of one wide matrix as it computes one, but not more, and not in a batch of them.
In float32 MKL has another kernel for one row than for two, and nothing that is as fast as both
helps; on a GPU cuBLAS chooses, and nothing is promised.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

# With AMX, matrices from 64 × 96 to 8000 × 256 and 4096 × 1024: up to 32 rows were those
# of one row bit for bit with `linear`, from 33 on not; in a batch of three matrices `bmm` differed
# from 18 rows on (K 1024), 11 (2048) and 5 (4096). Below 96 columns two rows may differ already,
# and each is a product of its own.
ROW_TILE = 32
TILED_COLUMNS = 96


def is_step(x: Tensor) -> bool:
    """Whether x [..., B, T, K] is one position of each of B texts."""
    return x.ndim > 2 and x.shape[-2] == 1


def step_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of rows x [M, K], each as it would be alone."""
    tile = ROW_TILE if x.shape[-1] >= TILED_COLUMNS else 1
    if len(x) <= tile or not is_tiled(x):
        return linear(x, weight, bias)
    return torch.cat([linear(rows, weight, bias) for rows in x.split(tile)])


def step_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """n products at once, x [n, M, K] with weights [n, N, K] and biases [n, N] -> [n, M, N]."""
    if x.shape[1] > 1 and is_tiled(x):
        biases = [None] * len(x) if bias is None else bias
        return torch.stack([step_linear(*one) for one in zip(x, weight, biases, strict=True)])
    return batched_matmul(x, weight, bias)


def batched_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same for rows of any kind, in one call: [n, M, K] and [n, N, K] -> [n, M, N]."""
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias[:, None], x, weight.mT)


def is_tiled(x: Tensor) -> bool:
    """Whether a step of rows x, of any shape, is cut into tiles."""
    return x.is_cpu and x.dtype == torch.bfloat16
