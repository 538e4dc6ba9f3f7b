"""Triton kernel behind `product_key_read`: the lookup and the sum of value rows in one launch.

Every program reads some columns of the rows, and looks for the rows itself: that is less than a
launch of its own would take.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 64
WARPS = 4
# Below whatever else is sorted.
NOTHING = tl.constexpr(-(2**63))


@triton.jit
def _ordered(bits):
    """The bits of float32 numbers as int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _packed(scores, numbers, inside):
    """Scores in float32 and numbers of int32 ≥ 0 as int64 that are ordered by the scores."""
    high = _ordered(scores.to(tl.int32, bitcast=True)).to(tl.int64) << 32
    return tl.where(inside, high | numbers.to(tl.int64), NOTHING)


@triton.jit
def _unpacked(keys):
    """The scores and numbers of `_packed`."""
    return _ordered((keys >> 32).to(tl.int32)).to(tl.float32, bitcast=True), keys.to(tl.int32)


@triton.jit
def _best(scores_ptr, n, WIDTH: tl.constexpr, BEST: tl.constexpr):
    """The best of n scores and their places, the best first."""
    place = tl.arange(0, WIDTH)
    scores = tl.load(scores_ptr + place, mask=place < n, other=0).to(tl.float32)
    return _unpacked(tl.topk(_packed(scores, place, place < n), BEST))


@triton.jit
def _kernel(
    scores_0_ptr,  # [heads, 2, n]
    scores_1_ptr,
    values_0_ptr,  # [heads · num_keys, C]
    values_1_ptr,
    ranks_a_ptr,  # int64 [pairs]
    ranks_b_ptr,
    y_ptr,  # [memories, C]
    heads,
    n,
    pairs,
    num_keys,
    C,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,  # powers of two that hold n, n_best, pairs and top_k
    BEST: tl.constexpr,
    PAIRS: tl.constexpr,
    READ: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    memory = tl.program_id(1)
    scores_ptr = scores_0_ptr
    values_ptr = values_0_ptr
    if memory == 1:
        scores_ptr = scores_1_ptr
        values_ptr = values_1_ptr
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    pair, rank = tl.arange(0, PAIRS), tl.arange(0, READ)
    rank_a = tl.load(ranks_a_ptr + pair, mask=pair < pairs, other=0).to(tl.int32)
    rank_b = tl.load(ranks_b_ptr + pair, mask=pair < pairs, other=0).to(tl.int32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for head in range(heads):
        scores_a, places_a = _best(scores_ptr + 2 * head * n, n, WIDTH, BEST)
        scores_b, places_b = _best(scores_ptr + (2 * head + 1) * n, n, WIDTH, BEST)
        scores = tl.gather(scores_a, rank_a, 0) + tl.gather(scores_b, rank_b, 0)
        keys = tl.gather(places_a, rank_a, 0) * n + tl.gather(places_b, rank_b, 0)
        scores, keys = _unpacked(tl.topk(_packed(scores, keys, pair < pairs), READ))
        scores = tl.where(rank < TOP_K, scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, 0))
        weights /= tl.sum(weights, 0)
        row = head * num_keys + keys
        inside = (rank < TOP_K)[:, None] & (column < C)[None, :]
        where = row.to(tl.int64)[:, None] * C + column[None, :]
        values = tl.load(values_ptr + where, mask=inside, other=0).to(tl.float32)
        total += tl.sum(weights[:, None] * values, 0)
    tl.store(y_ptr + memory * C + column, total, mask=column < C)


def _power(n: int) -> int:
    """The power of two that holds n, 2 at least: Triton sorts no fewer."""
    return max(2, triton.next_power_of_2(n))


def launch(
    scores: Sequence[Tensor],
    values: Sequence[Tensor],
    ranks_a: Tensor,
    ranks_b: Tensor,
    n_best: int,
    top_k: int,
    num_keys: int,
) -> Tensor:
    """`product_key_read` of one or two memories on a GPU, [M, C], in any dtype but float64."""
    scores = [own.contiguous() for own in scores]
    (heads, _, n), C, pairs = scores[0].shape, values[0].shape[1], len(ranks_a)
    y = values[0].new_empty(len(values), C)
    with torch.cuda.device_of(y):  # Triton asks for the current device, not for that of y
        _kernel[(triton.cdiv(C, COLUMNS), len(values))](
            scores[0],
            scores[-1],
            values[0],
            values[-1],
            ranks_a,
            ranks_b,
            y,
            heads,
            n,
            pairs,
            num_keys,
            C,
            TOP_K=top_k,
            WIDTH=_power(n),
            BEST=_power(n_best),
            PAIRS=_power(pairs),
            READ=_power(top_k),
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )
    return y
