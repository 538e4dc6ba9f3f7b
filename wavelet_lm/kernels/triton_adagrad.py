"""`adagrad_` as one Triton kernel for all weights: each number is read once and written once.

20 bytes a weight (weight and sum read and written, gradient read), as many where the gradient is in
half precision and a copy of the weight is written in it, and 4 or 2 before it for the norm, where
PyTorch's multi-tensor form moves 64, clipping 12 more and fp16 another 8.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from wavelet_lm.kernels import multi_tensor
from wavelet_lm.kernels.adagrad import Rates
from wavelet_lm.kernels.multi_tensor import by_kind, pointer


@triton.jit
def _update(
    w_ptr,
    g_ptr,
    s_ptr,
    c_ptr,
    inside,
    divisor,
    lr,
    decay,
    eps,
    DECOUPLED: tl.constexpr,
    COPY: tl.constexpr,
):
    w = tl.load(w_ptr, mask=inside, other=0)
    g = tl.div_rn(tl.load(g_ptr, mask=inside, other=0).to(tl.float32), divisor)
    if not DECOUPLED:
        g += decay * w
    s = tl.load(s_ptr, mask=inside, other=1) + g * g
    step = tl.div_rn(g, tl.sqrt_rn(s) + eps)
    if DECOUPLED:
        step += decay * w
    w -= lr * step
    tl.store(w_ptr, w, mask=inside)
    tl.store(s_ptr, s, mask=inside)
    if COPY is not None:
        tl.store(c_ptr, w.to(COPY), mask=inside)


@triton.jit
def _kernel(
    weights_ptr,  # int64 [n]: addresses
    gradients_ptr,  # int64 [n]
    copies_ptr,  # int64 [n], not read without copies
    sums_ptr,  # int64 [n]
    sizes_ptr,  # int64 [n]
    chunks_ptr,  # int32 [programs, 2]: the tensor, and which of its chunks
    divisor_ptr,  # float32 [1], or None
    skip_ptr,  # float32 [1], or None
    lr,
    decay,
    eps,
    DECOUPLED: tl.constexpr,
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
        s_ptr = pointer(sums_ptr, i, at, tl.float32, ALIGNED)
        c_ptr = w_ptr
        if COPY is not None:
            c_ptr = pointer(copies_ptr, i, at, COPY, ALIGNED)
        divisor = 1.0
        if divisor_ptr is not None:
            divisor = tl.load(divisor_ptr)
        size = tl.load(sizes_ptr + i)
        # Without a mask that cuts anywhere, a thread reads and writes 16 bytes at once.
        if first + SIZE <= size:
            inside = tl.full((SIZE,), True, tl.int1)
            _update(w_ptr, g_ptr, s_ptr, c_ptr, inside, divisor, lr, decay, eps, DECOUPLED, COPY)
        else:
            _update(w_ptr, g_ptr, s_ptr, c_ptr, at < size, divisor, lr, decay, eps, DECOUPLED, COPY)


class Launcher(multi_tensor.Launcher):
    """Called as `adagrad_`, for weights of float32; a launch for each kind."""

    def __call__(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        sums: Sequence[Tensor],
        rates: Rates,
        divisor: Tensor | None = None,
        skip: Tensor | None = None,
        copies: Sequence[Tensor | None] | None = None,
    ) -> None:
        numbers = (float(rates.lr), float(rates.weight_decay), float(rates.eps))
        for kind, tensors in by_kind(weights, gradients, copies, sums).items():
            self.launch(_kernel, kind, tensors, divisor, skip, *numbers, DECOUPLED=rates.decoupled)
