"""`adagrad_` as one Triton kernel for all weights: each number is read once and written once.

20 bytes a weight (weight and sum read and written, gradient read), and 4 before it for the norm,
where PyTorch's multi-tensor form moves 64, clipping 12 more and fp16 another 8. A program takes one
chunk of one tensor; where the tensors lie is a table in the GPU's memory, which changes only when
gradients get other places.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from wavelet_lm.kernels.adagrad import Rates

CHUNK = 4096
WARPS = 8
# Of addresses: what a thread reads at once.
ALIGNMENT = 16


@triton.jit
def _update(
    w_ptr,
    g_ptr,
    s_ptr,
    inside,
    divisor,
    lr,
    decay,
    eps,
    DECOUPLED: tl.constexpr,
):
    w = tl.load(w_ptr, mask=inside, other=0)
    g = tl.div_rn(tl.load(g_ptr, mask=inside, other=0), divisor)
    if not DECOUPLED:
        g += decay * w
    s = tl.load(s_ptr, mask=inside, other=1) + g * g
    step = tl.div_rn(g, tl.sqrt_rn(s) + eps)
    if DECOUPLED:
        step += decay * w
    tl.store(w_ptr, w - lr * step, mask=inside)
    tl.store(s_ptr, s, mask=inside)


@triton.jit
def _kernel(
    weights_ptr,  # int64 [n]: addresses
    sums_ptr,  # int64 [n]
    gradients_ptr,  # int64 [n]
    sizes_ptr,  # int64 [n]
    chunks_ptr,  # int32 [programs, 2]: the tensor, and which of its chunks
    divisor_ptr,  # float32 [1], or None
    skip_ptr,  # float32 [1], or None
    lr,
    decay,
    eps,
    DECOUPLED: tl.constexpr,
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
        g_ptr = tl.load(gradients_ptr + i).to(tl.pointer_type(tl.float32))
        s_ptr = tl.load(sums_ptr + i).to(tl.pointer_type(tl.float32))
        w_ptr = tl.multiple_of(w_ptr, ALIGNED) + at
        g_ptr = tl.multiple_of(g_ptr, ALIGNED) + at
        s_ptr = tl.multiple_of(s_ptr, ALIGNED) + at
        divisor = 1.0
        if divisor_ptr is not None:
            divisor = tl.load(divisor_ptr)
        size = tl.load(sizes_ptr + i)
        # Without a mask that cuts anywhere, a thread reads and writes 16 bytes at once.
        if first + SIZE <= size:
            inside = tl.full((SIZE,), True, tl.int1)
            _update(w_ptr, g_ptr, s_ptr, inside, divisor, lr, decay, eps, DECOUPLED)
        else:
            _update(w_ptr, g_ptr, s_ptr, at < size, divisor, lr, decay, eps, DECOUPLED)


class Launcher:
    """Steps of one list of weights after another; it remembers where the last ones lay.

    Called as `adagrad_`, for float32 alone.
    """

    def __init__(self) -> None:
        self._tables: dict[str, tuple[list[int], Tensor]] = {}
        self._chunks: tuple[list[int], Tensor] | None = None

    def __call__(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        sums: Sequence[Tensor],
        rates: Rates,
        divisor: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        gradients = [_laid_out_as(w, g) for w, g in zip(weights, gradients, strict=True)]
        device = weights[0].device
        sizes = [w.numel() for w in weights]
        addresses = {
            name: [_address(t) for t in tensors]
            for name, tensors in (("weights", weights), ("sums", sums), ("gradients", gradients))
        }
        tables = [self._table(name, values, device) for name, values in addresses.items()]
        aligned = all(a % ALIGNMENT == 0 for values in addresses.values() for a in values)
        chunks = self._programs(sizes, device)
        with torch.cuda.device_of(weights[0]):
            _kernel[(len(chunks),)](
                *tables,
                self._table("sizes", sizes, device),
                chunks,
                divisor,
                skip,
                float(rates.lr),
                float(rates.weight_decay),
                float(rates.eps),
                DECOUPLED=rates.decoupled,
                ALIGNED=ALIGNMENT if aligned else 4,
                SIZE=CHUNK,
                num_warps=WARPS,
            )

    def _table(self, name: str, values: list[int], device: torch.device) -> Tensor:
        """int64 [n] on the device, copied there only when it is another than the last time."""
        kept = self._tables.get(name)
        if kept is None or kept[0] != values or kept[1].device != device:
            kept = self._tables[name] = (values, _sent(torch.tensor(values), device))
        return kept[1]

    def _programs(self, sizes: list[int], device: torch.device) -> Tensor:
        """int32 [programs, 2]: every chunk of every tensor."""
        kept = self._chunks
        if kept is None or kept[0] != sizes or kept[1].device != device:
            n_chunks = torch.tensor([triton.cdiv(size, CHUNK) for size in sizes])
            tensor = torch.arange(len(sizes)).repeat_interleave(n_chunks)
            chunk = torch.arange(len(tensor)) - (n_chunks.cumsum(0) - n_chunks)[tensor]
            table = torch.stack([tensor, chunk], 1).to(torch.int32)
            kept = self._chunks = (sizes, _sent(table, device))
        return kept[1]


def _address(tensor: Tensor) -> int:
    if tensor.dtype != torch.float32:
        raise TypeError(f"Adagrad's kernel is for float32, not {tensor.dtype}")
    return tensor.data_ptr()


def _laid_out_as(weight: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the order of the weight's numbers, which autograd has it in anyway."""
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
