"""y = x Wᵀ with W stored in 8, 4 or 2 bits, for batches of n matrices [N, K].

8 bits: codes int8 [n, N, K] and scales [n, N, 1] of the rows,

    W[j, k] = code[j, k] · scale[j]

4 and 2 bits: codes uint8 [n, N, ⌈K / p⌉] with p = 8 / bits values u in a byte, the first in its
lowest bits, the unused places of a row's last byte 0; scales [n, N, ⌈K / group_size⌉], where group
g holds the k from g · group_size up to the next group, and group_size is a multiple of 16:

    W[j, k] = (u[j, k] − 2^(bits − 1) + ½) · scale[j, ⌊k / group_size⌋]

The grid of 4 and 2 bits has no zero (it is "mid-rise"), so that all of its 2^bits levels are used.
`reference_quantized_matmul` is the definition. `quantized_matmul` is what runs: with few rows of x
the time is that of reading the codes, and on a GPU a kernel reads nothing else.
"""

import torch
from torch import Tensor

from wavelet_lm.errors import UserError
from wavelet_lm.kernels.step_matmul import step_matmul

# Most rows of x for which the codes are read by the product itself. On a GPU this is one tile of
# the matrix units; beyond, the product is busy long enough that weights made once pay. On a CPU
# (1024 × 1024, one thread with AMX) 8 bits took 0.53 ms with 16 rows and 2.1 ms with 64, the
# product with weights made in bfloat16 0.48 and 0.60 ms; a step of decoding takes the first all the
# same, since rows must not depend on their number.
MAX_ROWS = 16
# torch's product of 8 bits on a CPU reads beyond the rows of a matrix whose width is no multiple.
CPU_WIDTH = 16
CPU4_GROUP_SIZES = (32, 64, 128, 256)


def pack(u: Tensor, bits: int) -> Tensor:
    """Values u [..., K] uint8 from 0 to 2^bits − 1 -> codes [..., ⌈K / p⌉] uint8; bits 4 or 2."""
    per = _values_per_byte(bits)
    u = torch.nn.functional.pad(u, (0, -u.shape[-1] % per))
    places = u.unflatten(-1, (-1, per)).unbind(-1)
    codes = places[0]
    for j, place in enumerate(places[1:], 1):
        codes = codes | (place << (bits * j))
    return codes


def unpack(codes: Tensor, K: int, bits: int) -> Tensor:
    """The values u [..., K] uint8 of which `pack` made codes [..., ⌈K / p⌉]."""
    per = _values_per_byte(bits)
    places = [(codes >> (bits * j)) & (2**bits - 1) for j in range(per)]
    return torch.stack(places, -1).flatten(-2)[..., :K]


def dequantize(
    codes: Tensor, scales: Tensor, K: int, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """W [n, N, K] in `dtype`, rounded to it once if the scales have that dtype or float32.

    codes: [n, N, …], int8 of 8 bits, else uint8.
    """
    if bits == 8:
        return (codes.to(dtype) * scales).to(dtype)
    # Exact in every floating dtype: halves of small odd numbers.
    levels = unpack(codes, K, bits).to(dtype) - (2 ** (bits - 1) - 0.5)
    scales = scales[..., None].expand(*scales.shape, group_size).flatten(-2)[..., :K]
    return (levels * scales).to(dtype)


def reference_quantized_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int
) -> Tensor:
    """The operation, column by column: x [n, M, K] -> y [n, M, N], slow.

    Codes are int8 or uint8; computed in float64, returned in x's dtype.
    """
    columns = []
    for k in range(x.shape[2]):
        if bits == 8:
            level, scale = codes[:, :, k].double(), scales[:, :, 0]
        else:
            place, byte = bits * (k % (8 // bits)), codes[:, :, k // (8 // bits)].int()
            level = (byte // 2**place % 2**bits).double() - 2 ** (bits - 1) + 0.5
            scale = scales[:, :, k // group_size]
        columns.append(level * scale.double())
    W = torch.stack(columns, dim=2)
    return torch.einsum("imk,ijk->imj", x.double(), W).to(x.dtype)


def quantized_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int, step: bool = False
) -> Tensor:
    """x [n, M, K] times the matrices of `codes` and `scales`, transposed: y [n, M, N] in x's dtype.

    x is floating, codes are int8 or uint8, the sums are float32 (float64 for float64, which is
    exact). On a CPU every other x is rounded to bfloat16. Traced by torch.compile as one graph.

    Args:
        step: the rows are positions of different texts: on a CPU each becomes what it would be
            alone, in any x but float64.

    Raises:
        ValueError: if bits are not 8, 4 or 2, or the sizes do not fit.
    """
    _check(x, codes, scales, bits, group_size)
    few = x.shape[1] <= MAX_ROWS
    if x.is_cpu and x.dtype != torch.float64:
        if bits == 8:
            return _cpu_int8_matmul(x, codes, scales, few or step)
        W = dequantize(codes, scales, x.shape[2], bits, group_size, torch.bfloat16)
        return step_matmul(x.bfloat16(), W).to(x.dtype) if step else _matmul(x, W)
    if x.is_cuda and few and x.dtype != torch.float64:
        return torch.ops.wavelet_lm.quantized_matmul(x, codes, scales, bits, group_size)
    return _matmul(x, dequantize(codes, scales, x.shape[2], bits, group_size, x.dtype))


def _matmul(x: Tensor, W: Tensor) -> Tensor:
    return torch.bmm(x.to(W.dtype), W.mT).to(x.dtype)


def _cpu_int8_matmul(x: Tensor, codes: Tensor, scales: Tensor, few: bool) -> Tensor:
    """x rounded to bfloat16, in which codes are exact: the scales multiply the products."""
    n, _, K = x.shape
    short = x.bfloat16()
    # torch's operator takes no scales but in x's dtype.
    if few and K % CPU_WIDTH == 0 and scales.dtype == short.dtype:
        rows, codes, scales = short.contiguous(), codes.contiguous(), scales.flatten(1).contiguous()
        y = [torch._weight_int8pack_mm(rows[i], codes[i], scales[i]) for i in range(n)]
        return torch.stack(y).to(x.dtype)
    W = codes.to(short.dtype)
    y = step_matmul(short, W) if few else torch.bmm(short, W.mT)
    # The product is rounded to bfloat16 already; what follows need not be.
    return (y.float() * scales.mT.float()).to(x.dtype)


@torch.library.custom_op("wavelet_lm::quantized_matmul", mutates_args=())
def _kernel_matmul(x: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """The Triton kernels; an operator of its own, which torch.compile takes as it is."""
    try:
        from wavelet_lm.kernels.triton_quantized_matmul import launch
    except ImportError as error:
        raise UserError(
            "quantized weights on a GPU need triton; install it with python -m pip install triton"
        ) from error
    return launch(x, codes, scales, bits, group_size)


@_kernel_matmul.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], codes.shape[1])


# --- torch's own layout of 4 bits on a CPU -------------------------------------------------------


def fits_cpu_layout(N: int, K: int, group_size: int) -> bool:
    """Whether `to_cpu_layout` takes a matrix [N, K] of 4 bits."""
    return N % 16 == 0 and K % group_size == 0 and group_size in CPU4_GROUP_SIZES


def to_cpu_layout(codes: Tensor, scales: Tensor, K: int, group_size: int) -> tuple[Tensor, Tensor]:
    """One matrix of 4 bits for `quantized_matmul_cpu4`.

    codes [N, K / 2] uint8 and scales [N, K / group_size] -> what torch calls packed, as many
    bytes, and scales_and_zeros [K / group_size, N, 2] bfloat16, where W = (u − 8) · scale + zero.

    Raises:
        ValueError: if `fits_cpu_layout` is false for it.
    """
    N = codes.shape[0]
    if not fits_cpu_layout(N, K, group_size):
        raise ValueError(
            f"no CPU layout for 4 bits of [{N}, {K}] in groups of {group_size}: N must be a"
            f" multiple of 16, K of the group's size, and that one of {CPU4_GROUP_SIZES}"
        )
    u = unpack(codes, K, 4).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(u, 1)
    scales_and_zeros = torch.stack([scales, scales / 2], -1).transpose(0, 1)
    return packed, scales_and_zeros.bfloat16().contiguous()


def quantized_matmul_cpu4(
    x: Tensor, packed: Tensor, scales_and_zeros: Tensor, group_size: int
) -> Tensor:
    """x [M, K] times a matrix from `to_cpu_layout`, transposed: y [M, N] in x's dtype.

    Rounds x to bfloat16.
    """
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.bfloat16(), packed, group_size, scales_and_zeros
    )
    return y.to(x.dtype)


# --- checks --------------------------------------------------------------------------------------


def _values_per_byte(bits: int) -> int:
    if bits not in (4, 2):
        raise ValueError(f"bits are {bits}; packed are 4 or 2")
    return 8 // bits


def _check(x: Tensor, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> None:
    if bits not in (8, 4, 2):
        raise ValueError(f"bits are {bits}; they must be 8, 4 or 2")
    n, _, K = x.shape
    N = codes.shape[1]
    if bits == 8:
        row, n_groups = K, 1
    elif group_size < 16 or group_size % 16:
        raise ValueError(f"group_size is {group_size}; it must be a multiple of 16")
    else:
        row, n_groups = -(-K * bits // 8), -(-K // group_size)
    if codes.shape != (n, N, row) or scales.shape != (n, N, n_groups):
        raise ValueError(
            f"codes {list(codes.shape)} and scales {list(scales.shape)} do not fit x"
            f" {list(x.shape)} with {bits} bits: they must be {[n, N, row]} and {[n, N, n_groups]}"
        )
