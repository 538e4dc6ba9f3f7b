"""Triton kernel behind `lifting_step`: all levels of one position in one launch.

Every product waits for the one before it. As launches of their own they would be 2 or 4 a level,
each of a few microseconds; here programs keep their rows throughout, and wait for each other in
between. While they wait, the weights of the next product are on their way already: those wait for
nothing.

All programs must run at once: there is at most one for each multiprocessor, and the launch is a
cooperative one, which the driver refuses where it cannot grant that, so that none waits for ever.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 16
# Weights that a program holds at a time, 64 of a thread.
TILE = 64 * 32 * WARPS
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Of addresses: what a thread reads at once.
ALIGNMENT = 16

# What becomes of a product y, with a of its own size.
GELU = tl.constexpr(0)  # gelu(y)
DETAIL = tl.constexpr(1)  # (a − y) / √2
APPROXIMATION = tl.constexpr(2)  # (a + y) / √2


@triton.jit
def _tile(w_ptr, block, N, K, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`ROWS` rows of weights [N, K]."""
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, WIDTH)[None, :]
    return tl.load(w_ptr + row * K + k, mask=(row < N) & (k < K), other=0)


@triton.jit
def _finish(tile, x, b_ptr, a_ptr, y_ptr, block, N, THEN: tl.constexpr, ROWS: tl.constexpr):
    """Write what becomes of the product of a tile with x [K]."""
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < N
    y = tl.sum(tile.to(tl.float32) * x[None, :], axis=1)
    y += tl.load(b_ptr + row, mask=inside, other=0).to(tl.float32)
    if THEN == GELU:
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    else:
        a = tl.load(a_ptr + row, mask=inside, other=0, cache_modifier=".cg").to(tl.float32)
        y = 0.7071067811865476 * (a - y if THEN == DETAIL else a + y)
    tl.store(y_ptr + row, y, mask=inside)


@triton.jit
def _product(
    tile,  # the first that this program takes
    w_ptr,  # [N, K]
    b_ptr,  # [N]
    x_ptr,  # [K]
    a_ptr,  # [N]
    y_ptr,  # [N]
    N,
    K,
    THEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The share of this program in y = what `THEN` makes of W x + b."""
    k = tl.arange(0, WIDTH)
    # Not through the first-level cache, which does not hear of what other programs write.
    x = tl.load(x_ptr + k, mask=k < K, other=0, cache_modifier=".cg").to(tl.float32)
    first, step = tl.program_id(0), tl.num_programs(0)
    _finish(tile, x, b_ptr, a_ptr, y_ptr, first, N, THEN, ROWS)
    for block in range(first + step, tl.cdiv(N, ROWS), step):
        tile = _tile(w_ptr, block, N, K, ROWS, WIDTH)
        _finish(tile, x, b_ptr, a_ptr, y_ptr, block, N, THEN, ROWS)


@triton.jit
def _arrive(arrivals_ptr):
    """Say that what this program has written can be read; what was said by all before it.

    The last one of all flips the sign of the count, and the first program's share of it takes care
    that it is then 0 or −2^31 again.
    """
    tl.debug_barrier()  # all threads have written
    n = tl.num_programs(0)
    return tl.atomic_add(arrivals_ptr, tl.where(tl.program_id(0) == 0, 2147483647 - (n - 2), 1))


@triton.jit
def _wait(arrivals_ptr, before):
    """Until all programs have arrived, for one that did when the count was `before`."""
    now = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
    while (before ^ now) >= 0:
        now = tl.atomic_add(arrivals_ptr, 0, sem="acquire")


@triton.jit
def _one(
    level,
    NUMBER: tl.constexpr,
    x_ptr,
    pasts_ptr,
    layers_ptr,
    approximations_ptr,
    details_ptr,
    hidden_ptr,
    arrivals_ptr,
    before,
    C,
    H,
    TYPE: tl.constexpr,
    DEEP: tl.constexpr,
    ALONE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN_ROWS: tl.constexpr,
    HIDDEN_WIDTH: tl.constexpr,
):
    """The product of this number of a level; `before` is what the one before has arrived with."""
    LAYERS: tl.constexpr = 2 if DEEP else 1
    UPDATES: tl.constexpr = NUMBER >= LAYERS
    MAKES_HIDDEN: tl.constexpr = DEEP and NUMBER % 2 == 0
    READS_HIDDEN: tl.constexpr = DEEP and NUMBER % 2 == 1
    OF_ROWS: tl.constexpr = HIDDEN_ROWS if READS_HIDDEN else ROWS
    OF_WIDTH: tl.constexpr = HIDDEN_WIDTH if READS_HIDDEN else WIDTH
    N = H if MAKES_HIDDEN else C
    K = H if READS_HIDDEN else C
    layer_ptr = layers_ptr + 2 * (2 * LAYERS * level + NUMBER)
    w_ptr = tl.multiple_of(tl.load(layer_ptr).to(tl.pointer_type(TYPE)), ALIGNED)
    b_ptr = tl.load(layer_ptr + 1).to(tl.pointer_type(TYPE))
    signal_ptr = approximations_ptr + (level - 1) * C
    if level == 0:
        signal_ptr = x_ptr
    detail_ptr = details_ptr + level * C
    inner_ptr = hidden_ptr + (2 * level + UPDATES) * H
    tile = _tile(w_ptr, tl.program_id(0), N, K, OF_ROWS, OF_WIDTH)
    if not ALONE and (NUMBER > 0 or level > 0):
        _wait(arrivals_ptr, before)
    read_ptr = inner_ptr if READS_HIDDEN else detail_ptr if UPDATES else signal_ptr
    if MAKES_HIDDEN:
        _product(tile, w_ptr, b_ptr, read_ptr, read_ptr, inner_ptr, N, K, GELU, OF_ROWS, OF_WIDTH)
    elif UPDATES:
        y_ptr = approximations_ptr + level * C
        _product(
            tile, w_ptr, b_ptr, read_ptr, signal_ptr, y_ptr, N, K, APPROXIMATION, OF_ROWS, OF_WIDTH
        )
    else:
        a_ptr = pasts_ptr + level * C
        _product(tile, w_ptr, b_ptr, read_ptr, a_ptr, detail_ptr, N, K, DETAIL, OF_ROWS, OF_WIDTH)
    if not ALONE:
        before = _arrive(arrivals_ptr)
    return before


@triton.jit
def _kernel(
    x_ptr,  # [C]
    pasts_ptr,  # [L, C]
    layers_ptr,  # int64: addresses of weights and bias, product by product
    approximations_ptr,  # [L, C]
    details_ptr,  # [L, C]
    hidden_ptr,  # [2 L, H]
    arrivals_ptr,
    levels,
    C,
    H,
    TYPE: tl.constexpr,
    DEEP: tl.constexpr,
    ALONE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN_ROWS: tl.constexpr,
    HIDDEN_WIDTH: tl.constexpr,
):
    """ROWS of WIDTH are a tile of rows of C weights, HIDDEN_ROWS of HIDDEN_WIDTH of H."""
    before = tl.full((), 0, tl.int32)
    for level in range(levels):
        for i in tl.static_range(4 if DEEP else 2):
            before = _one(
                level,
                i,
                x_ptr,
                pasts_ptr,
                layers_ptr,
                approximations_ptr,
                details_ptr,
                hidden_ptr,
                arrivals_ptr,
                before,
                C,
                H,
                TYPE,
                DEEP,
                ALONE,
                ALIGNED,
                ROWS,
                WIDTH,
                HIDDEN_ROWS,
                HIDDEN_WIDTH,
            )


# Kept for as long as the process: a graph that was captured goes on reading them.
_tables: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}


def launch(
    x: Tensor, pasts: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], arrivals: Tensor
) -> tuple[Tensor, Tensor]:
    """`lifting_step` on a GPU: x [C] and pasts [L, C] -> two of [L, C].

    All are of float32, bfloat16 or float16, and the weights contiguous.

    The first call with weights copies their addresses to the GPU: it cannot be captured in a graph.
    """
    x, pasts = x.contiguous(), pasts.contiguous()
    C, H = pasts.shape[1], weights[0].shape[0]
    programs, tiles = plan(C, H, _multiprocessors(x.device))
    results = torch.empty_like(pasts), torch.empty_like(pasts)
    hidden = x.new_empty(len(weights) // 2, H)
    run(x, pasts, weights, biases, arrivals, *results, hidden, programs, tiles)
    return results


def run(
    x: Tensor,
    pasts: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    arrivals: Tensor,
    approximations: Tensor,
    details: Tensor,
    hidden: Tensor,
    programs: int,
    tiles: dict[str, int],
) -> None:
    """`launch` into results [L, C], by way of hidden [number of nets, H]."""
    L, C = pasts.shape
    addresses = tuple(t.data_ptr() for pair in zip(weights, biases, strict=True) for t in pair)
    with torch.cuda.device_of(x):  # Triton asks for the current device, not for that of x
        _kernel[(programs,)](
            x,
            pasts,
            _table(addresses, x.device),
            approximations,
            details,
            hidden,
            arrivals,
            L,
            C,
            hidden.shape[1],
            TYPE=TYPES[x.dtype],
            DEEP=len(weights) == 4 * L,
            ALONE=programs == 1,
            ALIGNED=ALIGNMENT if all(a % ALIGNMENT == 0 for a in addresses) else 2,
            **tiles,
            num_warps=WARPS,
            launch_cooperative_grid=True,
        )


def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses on the device, int64; they are copied there when they are first asked for."""
    key = (device, addresses)
    if key not in _tables:
        table = torch.tensor(addresses)
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        _tables[key] = table
    return _tables[key]


def plan(C: int, H: int, multiprocessors: int) -> tuple[int, dict[str, int]]:
    """How many programs, at most one for each multiprocessor, and their tiles.

    Of few rows tiles get smaller, so that no multiprocessor is left without.
    """

    def rows(N: int, K: int) -> int:
        return max(1, min(TILE // _power(K), _power(N) // _floor_power(multiprocessors)))

    tiles = {
        "ROWS": rows(max(C, H), C),
        "WIDTH": _power(C),
        "HIDDEN_ROWS": rows(C, H),
        "HIDDEN_WIDTH": _power(H),
    }
    blocks = max(triton.cdiv(max(C, H), tiles["ROWS"]), triton.cdiv(C, tiles["HIDDEN_ROWS"]))
    return min(blocks, multiprocessors), tiles


def _power(n: int) -> int:
    return triton.next_power_of_2(n)


def _floor_power(n: int) -> int:
    return 1 << (n.bit_length() - 1)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
