"""What Triton kernels over lists of tensors share: the tables of where these lie.

A program takes one chunk of one tensor. The tables are in the GPU's memory and change only when
tensors, gradients above all, get other places.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
WARPS = 8
# What gradients and copies may be, besides float32; of copies None says that there is none.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Of addresses: what a thread reads at once.
ALIGNMENT = 16

# The dtypes of a gradient and of a copy.
Kind = tuple[torch.dtype, torch.dtype | None]


@triton.jit
def pointer(table_ptr, i, at, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """To the numbers `at` [n] of the i-th tensor of a table of addresses."""
    address = tl.load(table_ptr + i).to(tl.pointer_type(TYPE))
    return tl.multiple_of(address, ALIGNED) + at


class Launcher:
    """Steps of one list of weights after another; it remembers where the last ones lay."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[list[int], Tensor]] = {}

    def launch(
        self,
        kernel: Any,
        kind: Kind,
        tensors: Sequence[tuple[Tensor, ...]],
        divisor: Tensor | None,
        skip: Tensor | None,
        *arguments: Any,
        **constants: Any,
    ) -> None:
        """Run a kernel over all chunks of all tensors.

        Args:
            kernel: its arguments are a table of each column of `tensors`, sizes, chunks, divisor,
                skip and these `arguments`; GRADIENT, COPY, ALIGNED, SIZE and the `constants`.
            tensors: as `by_kind` has them.
            divisor, skip: 0-d float32, or None.
        """
        device = tensors[0][0].device
        sizes = [w.numel() for w, *_ in tensors]
        addresses = [[t.data_ptr() for t in column] for column in zip(*tensors, strict=True)]
        aligned = all(a % ALIGNMENT == 0 for values in addresses for a in values)
        chunks = self._sent((kind, "chunks"), sizes, _chunks, device)
        with torch.cuda.device_of(tensors[0][0]):
            kernel[(len(chunks),)](
                *(
                    self._sent((kind, number), values, torch.tensor, device)
                    for number, values in enumerate([*addresses, sizes])
                ),
                chunks,
                divisor,
                skip,
                *arguments,
                GRADIENT=TYPES[kind[0]],
                COPY=None if kind[1] is None else TYPES[kind[1]],
                ALIGNED=ALIGNMENT if aligned else 2,
                SIZE=CHUNK,
                num_warps=WARPS,
                **constants,
            )

    def _sent(
        self, key: Any, values: list[int], made: Callable[[list[int]], Tensor], device: torch.device
    ) -> Tensor:
        """What is made of the values on the device; copied only when they are not the last ones."""
        kept = self._kept.get(key)
        if kept is None or kept[0] != values or kept[1].device != device:
            kept = self._kept[key] = (values, _copied(made(values), device))
        return kept[1]


def by_kind(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    copies: Sequence[Tensor | None] | None,
    *states: Sequence[Tensor],
) -> dict[Kind, list[tuple[Tensor, ...]]]:
    """Of each weight itself, its gradient, its copy, or itself again, and its states, by kind.

    Args:
        weights, states: float32, of one shape for each weight.
        gradients, copies: of that shape, float32 or in half precision; None where there is none.

    Raises:
        TypeError: of any other dtype.
    """
    kinds = defaultdict(list)
    rows = zip(weights, gradients, copies or [None] * len(weights), *states, strict=True)
    for w, g, copy, *of_weight in rows:
        kind = (g.dtype, None if copy is None else copy.dtype)
        wide = {w.dtype, *(state.dtype for state in of_weight)}
        wrong = wide - {torch.float32} or {*kind} - {None, *TYPES}
        if wrong:
            raise TypeError(f"the kernel of a step is not for {wrong.pop()}")
        kinds[kind].append((w, _laid_out_as(w, g), w if copy is None else copy, *of_weight))
    return kinds


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
