"""`adagrad_` as one Triton kernel for all weights: each number is read once and written once.

20 bytes a weight (weight and sum read and written, gradient read), as many where the gradient is in
half precision and a copy of the weight is written in it, and 4 or 2 before it for the norm, where
PyTorch's multi-tensor form moves 64, clipping 12 more and fp16 another 8. A program takes one
chunk of one tensor; where the tensors lie is a table in the GPU's memory, which changes only when
gradients get other places.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavelet_lm.kernels.adagrad import Rates

CHUNK = 4096
WARPS = 8
# What gradients and copies may be, besides float32; of copies None says that there is none.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Of addresses: what a thread reads at once.
ALIGNMENT = 16


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
    sums_ptr,  # int64 [n]
    gradients_ptr,  # int64 [n]
    copies_ptr,  # int64 [n], not read without copies
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
        w_ptr = tl.load(weights_ptr + i).to(tl.pointer_type(tl.float32))
        g_ptr = tl.load(gradients_ptr + i).to(tl.pointer_type(GRADIENT))
        s_ptr = tl.load(sums_ptr + i).to(tl.pointer_type(tl.float32))
        w_ptr = tl.multiple_of(w_ptr, ALIGNED) + at
        g_ptr = tl.multiple_of(g_ptr, ALIGNED) + at
        s_ptr = tl.multiple_of(s_ptr, ALIGNED) + at
        c_ptr = w_ptr
        if COPY is not None:
            c_ptr = tl.load(copies_ptr + i).to(tl.pointer_type(COPY))
            c_ptr = tl.multiple_of(c_ptr, ALIGNED) + at
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


class Launcher:
    """Steps of one list of weights after another; it remembers where the last ones lay.

    Called as `adagrad_`, for weights of float32; a launch for each kind of gradients and copies.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[list[int], Tensor]] = {}

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
        kinds = defaultdict(list)
        rows = zip(weights, sums, gradients, copies or [None] * len(weights), strict=True)
        for w, s, g, copy in rows:
            kind = (g.dtype, None if copy is None else copy.dtype)
            wrong = {w.dtype, s.dtype} - {torch.float32} or {*kind} - {None, *TYPES}
            if wrong:
                raise TypeError(f"Adagrad's kernel is not for {wrong.pop()}")
            kinds[kind].append((w, s, _laid_out_as(w, g), w if copy is None else copy))
        for kind, tensors in kinds.items():
            self._launch(kind, tensors, rates, divisor, skip)

    def _launch(
        self,
        kind: tuple[torch.dtype, torch.dtype | None],
        tensors: list[tuple[Tensor, ...]],
        rates: Rates,
        divisor: Tensor | None,
        skip: Tensor | None,
    ) -> None:
        """tensors: of each weight itself, its sum, its gradient and its copy, or itself again."""
        device = tensors[0][0].device
        sizes = [w.numel() for w, *_ in tensors]
        addresses = [[t.data_ptr() for t in column] for column in zip(*tensors, strict=True)]
        aligned = all(a % ALIGNMENT == 0 for values in addresses for a in values)
        chunks = self._sent((kind, "chunks"), sizes, _chunks, device)
        with torch.cuda.device_of(tensors[0][0]):
            _kernel[(len(chunks),)](
                *(
                    self._sent((kind, number), values, torch.tensor, device)
                    for number, values in enumerate([*addresses, sizes])
                ),
                chunks,
                divisor,
                skip,
                float(rates.lr),
                float(rates.weight_decay),
                float(rates.eps),
                DECOUPLED=rates.decoupled,
                GRADIENT=TYPES[kind[0]],
                COPY=None if kind[1] is None else TYPES[kind[1]],
                ALIGNED=ALIGNMENT if aligned else 2,
                SIZE=CHUNK,
                num_warps=WARPS,
            )

    def _sent(
        self, key: Any, values: list[int], made: Callable[[list[int]], Tensor], device: torch.device
    ) -> Tensor:
        """What is made of the values on the device; copied only when they are not the last ones."""
        kept = self._kept.get(key)
        if kept is None or kept[0] != values or kept[1].device != device:
            kept = self._kept[key] = (values, _copied(made(values), device))
        return kept[1]


def _chunks(sizes: list[int]) -> Tensor:
    """int32 [programs, 2]: every chunk of every tensor."""
    n_chunks = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
    tensor = torch.arange(len(sizes)).repeat_interleave(n_chunks)
    chunk = torch.arange(len(tensor)) - (n_chunks.cumsum(0) - n_chunks)[tensor]
    return torch.stack([tensor, chunk], 1).to(torch.int32)


def _laid_out_as(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the order of the weight's numbers, which autograd has it in anyway."""
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)


def _copied(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
