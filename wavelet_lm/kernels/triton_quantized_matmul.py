"""Triton kernels behind `quantized_matmul` for few rows of x on a GPU.

Codes and scales are read once and become floating-point numbers in registers. `_reduction_kernel`
multiplies and adds: a thread reads runs of codes of a row, so that sums stay within threads
until the end. From a few rows of x on, that arithmetic would take longer than the reading, and
`_dot_kernel` leaves it to the matrix units. Neither splits a row of codes over programs: a result
does not depend on how the GPU schedules them.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Per code of 8 bits the multiply-and-reduce takes 6 instructions with one row of x and 9 with two
# (counted in the machine code for an H200, which can issue 7 to 8 while its memory delivers one
# byte), the other kernel 5, but each of its programs needs 16 rows of codes.
MAX_REDUCED_ROWS = 2
# One tile of the matrix units.
MAX_ROWS = 16

# Values of a row that a program takes at a time, and those of them that a thread takes in one load,
# of at most 16 bytes, the widest there is.
BLOCK_VALUES = 2048
CHUNK_VALUES = 32
CHUNK_BYTES = 16
# Programs that fill a GPU of 132 multiprocessors with four each: below, tiles get fewer rows.
FULL_GRID = 4 * 132


# A GPU is slow at converting integers to floating-point numbers. As the low bits of 2^23, of which
# it has one more than that number has bits behind the point, an integer costs one subtraction.


@triton.jit
def _signed(codes):
    """int8 as float32: 2^23 + 2^22 + code, less the first two."""
    return (codes.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def _bits(word, MASK: tl.constexpr):
    """The bits in MASK of a word, which is 0x4B000000 | byte, as float32."""
    return (word & (0x4B000000 | MASK)).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _reduction_kernel(
    x_ptr,  # [n, M, K]
    codes_ptr,  # [n, N, row_bytes]
    scales_ptr,  # [n, N, n_groups]
    y_ptr,  # [n, M, N]
    M,
    N,
    K,
    row_bytes,
    n_groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    VALUES: tl.constexpr = CHUNK * PER
    MIDDLE: tl.constexpr = 2 ** (BITS - 1) - 0.5
    i = tl.program_id(1).to(tl.int64)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    row_at = (i * N + row)[None, :, None, None]
    x_at = ((i * M + m) * K)[:, None, None]
    # [M, N, chunk]: chunks are added up when all of the row has been read.
    sums = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_CHUNKS), tl.float32)
    for start in range(0, row_bytes, BLOCK_CHUNKS * CHUNK):
        byte = start + (chunk * CHUNK)[:, None] + tl.arange(0, CHUNK)[None, :]
        byte = byte[None, None, :, :]
        inside = (row[None, :, None, None] < N) & (byte < row_bytes)
        codes = tl.load(codes_ptr + row_at * row_bytes + byte, mask=inside, other=0)
        k = start * PER + (chunk * VALUES)[:, None] + tl.arange(0, VALUES)[None, :]
        k = k[None, :, :]
        inside = (m[:, None, None] < M) & (k < K)
        x = tl.load(x_ptr + x_at + k, mask=inside, other=0).to(tl.float32)
        if BITS == 8:
            sums += tl.sum(x[:, None, :, :] * _signed(codes), axis=3)
        else:
            # Values stay at their place in the byte, 2^(BITS j) too large: x makes up for it.
            word = codes.to(tl.int32) | 0x4B000000
            if BITS == 4:
                x0, x1 = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_CHUNKS, CHUNK, 2)))
                part = tl.sum(x0[:, None, :, :] * _bits(word, 0x0F), axis=3)
                part += tl.sum((x1 * 2**-4)[:, None, :, :] * _bits(word, 0xF0), axis=3)
            else:
                even, odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_CHUNKS, CHUNK, 2, 2)))
                x0, x2 = tl.split(even)
                x1, x3 = tl.split(odd)
                part = tl.sum(x0[:, None, :, :] * _bits(word, 0x03), axis=3)
                part += tl.sum((x1 * 2**-2)[:, None, :, :] * _bits(word, 0x0C), axis=3)
                part += tl.sum((x2 * 2**-4)[:, None, :, :] * _bits(word, 0x30), axis=3)
                part += tl.sum((x3 * 2**-6)[:, None, :, :] * _bits(word, 0xC0), axis=3)
            # Σ x (u − middle) = Σ x u − middle Σ x: the offset costs nothing per code.
            offset = MIDDLE * tl.sum(x, axis=2)[:, None, :]
            first = start * PER + chunk * VALUES
            at = (i * N + row)[:, None] * n_groups + first[None, :] // GROUP_SIZE
            inside = (row[:, None] < N) & (first[None, :] < K)
            scale = tl.load(scales_ptr + at, mask=inside, other=0).to(tl.float32)
            sums += (part - offset) * scale[None, :, :]
    y = tl.sum(sums, axis=2)
    if BITS == 8:
        y *= tl.load(scales_ptr + i * N + row, mask=row < N, other=0).to(tl.float32)[None, :]
    inside = (m[:, None] < M) & (row[None, :] < N)
    tl.store(y_ptr + (i * M + m[:, None]) * N + row[None, :], y, mask=inside)


@triton.jit
def _dot_kernel(
    x_ptr,  # [n, M, K]
    codes_ptr,  # [n, N, row_bytes]
    scales_ptr,  # [n, N, n_groups]
    y_ptr,  # [n, M, N]
    M,
    N,
    K,
    row_bytes,
    n_groups,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    MIDDLE: tl.constexpr = 2 ** (BITS - 1) - 0.5
    i = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, BLOCK_M)[:, None]
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, row_bytes, BLOCK_BYTES):
        byte = start + tl.arange(0, BLOCK_BYTES)
        inside = (byte[:, None] < row_bytes) & (row < N)
        at = (i * N + row) * row_bytes + byte[:, None]
        codes = tl.load(codes_ptr + at, mask=inside, other=0)
        k = byte[None, :] * PER
        x_at = (i * M + m) * K + k
        if BITS == 8:
            x = tl.load(x_ptr + x_at, mask=(m < M) & (k < K), other=0)
            y = tl.dot(x, codes.to(x.dtype), y, input_precision="ieee")
        else:
            # A tile lies within a group, whose scale multiplies the product.
            part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for j in tl.static_range(PER):
                x = tl.load(x_ptr + x_at + j, mask=(m < M) & (k + j < K), other=0)
                u = (codes.to(tl.int32) >> (BITS * j)) | 0x4B000000
                value = (_bits(u, 2**BITS - 1) - MIDDLE).to(x.dtype)
                part = tl.dot(x, value, part, input_precision="ieee")
            at = (i * N + row) * n_groups + start * PER // GROUP_SIZE
            y += part * tl.load(scales_ptr + at, mask=row < N, other=0).to(tl.float32)
    if BITS == 8:
        y *= tl.load(scales_ptr + i * N + row, mask=row < N, other=0).to(tl.float32)
    tl.store(y_ptr + (i * M + m) * N + row, y, mask=(m < M) & (row < N))


def launch(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    tiles: Mapping[str, int] | None = None,
) -> Tensor:
    """`quantized_matmul` for M ≤ `MAX_ROWS`, x in float32, bfloat16 or float16.

    x: [n, M, K], codes int8 or uint8; the result is [n, M, N].
    tiles: to try others than `plan` has chosen.
    """
    x, codes, scales = x.contiguous(), codes.contiguous(), scales.contiguous()
    n, M, K = x.shape
    N, row_bytes = codes.shape[1:]
    y = torch.empty(n, M, N, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    kernel, planned = plan(n, M, N, row_bytes, bits, group_size, x.dtype)
    tiles = planned | dict(tiles or {})
    grid = (triton.cdiv(N, tiles["BLOCK_N"]), n, triton.cdiv(M, tiles["BLOCK_M"]))
    sizes = (M, N, K, row_bytes, scales.shape[2])
    with torch.cuda.device_of(x):  # Triton asks for the current device, not for that of x
        kernel[grid](x, codes, scales, y, *sizes, BITS=bits, GROUP_SIZE=group_size, **tiles)
    return y


def plan(
    n: int, M: int, N: int, row_bytes: int, bits: int, group_size: int, dtype: torch.dtype
) -> tuple[Any, dict[str, int]]:
    """The kernel for a product of these sizes, and its tiles and warps.

    Groups too small for a matrix unit are left to the other kernel, with codes read more than once.
    """
    if M > MAX_REDUCED_ROWS and within_group(bits, group_size, 16) == 16:
        return _dot_kernel, _dot_tiles(n, N, row_bytes, bits, group_size, dtype)
    return _reduction_kernel, _reduction_tiles(n, M, N, row_bytes, bits, group_size)


def _reduction_tiles(
    n: int, M: int, N: int, row_bytes: int, bits: int, group_size: int
) -> dict[str, int]:
    """As many rows of codes for a program as leave enough programs.

    Of 8 rows, each of the 64 threads has up to 16 loads under way at once.
    """
    block_m = min(triton.next_power_of_2(M), MAX_REDUCED_ROWS)
    chunk = within_group(bits, group_size, min(CHUNK_BYTES, CHUNK_VALUES * bits // 8))
    n_chunks = triton.next_power_of_2(triton.cdiv(row_bytes, chunk))
    n_chunks = min(n_chunks, BLOCK_VALUES * bits // 8 // chunk)
    block_n = 8 // block_m
    while block_n > 1 and n * triton.cdiv(N, block_n) < FULL_GRID * 3 // 4:
        block_n //= 2
    return {
        "CHUNK": chunk,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_CHUNKS": n_chunks,
        "num_warps": 2 if n_chunks >= 64 else 1,
    }


def _dot_tiles(
    n: int, N: int, row_bytes: int, bits: int, group_size: int, dtype: torch.dtype
) -> dict[str, int]:
    """Rows of codes for a program, 256 bytes of each at a time, four such tiles under way."""
    block_n = 32 if n * N >= FULL_GRID * 32 else 16
    # Products in float32 are not for the matrix units, and larger tiles leave the registers.
    most = 32 if dtype == torch.float32 else 256
    block_bytes = min(most, max(16, triton.next_power_of_2(row_bytes)))
    return {
        "BLOCK_M": MAX_ROWS,
        "BLOCK_N": block_n,
        "BLOCK_BYTES": within_group(bits, group_size, block_bytes),
        "num_warps": block_n // 8,
        "num_stages": 5,
    }


def within_group(bits: int, group_size: int, n_bytes: int) -> int:
    """The most bytes, a power of two up to `n_bytes`, of which each run lies within one group."""
    if bits == 8:
        return n_bytes
    group_bytes = group_size * bits // 8
    return min(n_bytes, group_bytes & -group_bytes)
