"""`adamw_` as one Triton kernel for all weights: each number is read once and written once.

28 bytes a weight: weight and two moments, read and written, are 24, a gradient in half precision
and the copy that is written in it the other 4, as is one in float32. Before it the norm reads 2 or
4. PyTorch's fused form needs gradients in float32 made of the halves, 6 bytes more and 2 for their
greater width, and a pass for the copies, another 4 beside those it writes.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from wavelet_lm.kernels import multi_tensor
from wavelet_lm.kernels.adamw import Rates, corrections
from wavelet_lm.kernels.multi_tensor import by_kind, pointer


@triton.jit
def _update(
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    c_ptr,
    inside,
    divisor,
    kept,
    rate,
    of_second,
    less_beta1,
    beta2,
    less_beta2,
    eps,
    COPY: tl.constexpr,
):
    w = tl.load(w_ptr, mask=inside, other=0)
    g = tl.div_rn(tl.load(g_ptr, mask=inside, other=0).to(tl.float32), divisor)
    m = tl.load(m_ptr, mask=inside, other=0)
    v = tl.load(v_ptr, mask=inside, other=1)
    m += less_beta1 * (g - m)
    v = beta2 * v + less_beta2 * g * g
    root = tl.div_rn(tl.sqrt_rn(v), of_second) + eps
    w = kept * w - rate * tl.div_rn(m, root)
    tl.store(w_ptr, w, mask=inside)
    tl.store(m_ptr, m, mask=inside)
    tl.store(v_ptr, v, mask=inside)
    if COPY is not None:
        tl.store(c_ptr, w.to(COPY), mask=inside)


@triton.jit
def _kernel(
    weights_ptr,  # int64 [n]: addresses
    gradients_ptr,  # int64 [n]
    copies_ptr,  # int64 [n], not read without copies
    firsts_ptr,  # int64 [n]
    seconds_ptr,  # int64 [n]
    sizes_ptr,  # int64 [n]
    chunks_ptr,  # int32 [programs, 2]: the tensor, and which of its chunks
    divisor_ptr,  # float32 [1], or None
    skip_ptr,  # float32 [1], or None
    corrections_ptr,  # float32 [n, 2]
    lr,
    kept,
    less_beta1,
    beta2,
    less_beta2,
    eps,
    GRADIENT: tl.constexpr,  # their types
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    SIZE: tl.constexpr,
):
    wanted = True
    if skip_ptr is not None:
        wanted = tl.load(skip_ptr) == 0
    if wanted:
        program = tl.program_id(0).to(tl.int64)
        i = tl.load(chunks_ptr + 2 * program)
        first = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * SIZE
        at = first + tl.arange(0, SIZE)
        w_ptr = pointer(weights_ptr, i, at, tl.float32, ALIGNED)
        g_ptr = pointer(gradients_ptr, i, at, GRADIENT, ALIGNED)
        m_ptr = pointer(firsts_ptr, i, at, tl.float32, ALIGNED)
        v_ptr = pointer(seconds_ptr, i, at, tl.float32, ALIGNED)
        c_ptr = w_ptr
        if COPY is not None:
            c_ptr = pointer(copies_ptr, i, at, COPY, ALIGNED)
        divisor = 1.0
        if divisor_ptr is not None:
            divisor = tl.load(divisor_ptr)
        rate = tl.div_rn(lr, tl.load(corrections_ptr + 2 * i))
        of_second = tl.load(corrections_ptr + 2 * i + 1)
        size = tl.load(sizes_ptr + i)
        # Without a mask that cuts anywhere, a thread reads and writes 16 bytes at once.
        if first + SIZE <= size:
            _update(
                w_ptr,
                g_ptr,
                m_ptr,
                v_ptr,
                c_ptr,
                tl.full((SIZE,), True, tl.int1),
                divisor,
                kept,
                rate,
                of_second,
                less_beta1,
                beta2,
                less_beta2,
                eps,
                COPY,
            )
        else:
            _update(
                w_ptr,
                g_ptr,
                m_ptr,
                v_ptr,
                c_ptr,
                at < size,
                divisor,
                kept,
                rate,
                of_second,
                less_beta1,
                beta2,
                less_beta2,
                eps,
                COPY,
            )


class Launcher(multi_tensor.Launcher):
    """Called as `adamw_`, for weights of float32; a launch for each kind."""

    def __call__(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        firsts: Sequence[Tensor],
        seconds: Sequence[Tensor],
        steps: Sequence[Tensor],
        rates: Rates,
        divisor: Tensor | None = None,
        skip: Tensor | None = None,
        copies: Sequence[Tensor | None] | None = None,
    ) -> None:
        lr, decay, (beta1, beta2), eps = rates
        numbers = [float(x) for x in (lr, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, eps)]
        for kind, rows in by_kind(weights, gradients, copies, firsts, seconds, steps).items():
            table = corrections([row[-1] for row in rows], rates.betas)
            self.launch(_kernel, kind, [row[:-1] for row in rows], divisor, skip, table, *numbers)
