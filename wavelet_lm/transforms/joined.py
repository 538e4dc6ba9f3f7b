"""Weights that products read together, as rows of one tensor.

A model names its weights one by one, and so they are trained and saved. Where products read some of
them at once, their copies in half precision (`training/working_weights.py`) are laid out as rows of
one tensor, which is then read as it is; other weights are put together when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Joint(NamedTuple):
    """Weights that a module reads by `joined`, or neighbours among them: each [n_i, ...].

    Zeros follow them up to `n_rows`; None = none.
    """

    parts: Sequence[nn.Parameter]
    n_rows: int | None = None


def joined(parts: Sequence[Tensor], n_rows: int | None = None) -> Tensor:
    """The rows of all parts, each [n_i, ...], and zeros up to `n_rows`: [n_rows, ...].

    It is no copy where `laid_out` has put these parts one behind the other.
    """
    starts = [0, *accumulate(map(len, parts))]
    n_rows = n_rows or starts[-1]
    whole, at = getattr(parts[0], "whole", None), getattr(parts[0], "at", 0)
    if whole is not None and all(
        part.whole is whole and part.at == at + start
        for part, start in zip(parts, starts, strict=False)
    ):
        return _Rows.apply(whole[at : at + n_rows], *parts)
    if n_rows > starts[-1]:
        parts = [*parts, parts[0].new_zeros(n_rows - starts[-1], *parts[0].shape[1:])]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@torch.no_grad()
def laid_out(joint: Joint, dtype: torch.dtype) -> list[nn.Parameter]:
    """Copies of the parts in the dtype, each in its part's shape, which `joined` finds together."""
    first, (*starts, total) = joint.parts[0], [0, *accumulate(map(len, joint.parts))]
    shape = (joint.n_rows or total, *first.shape[1:])
    whole = torch.zeros(shape, dtype=dtype, device=first.device)
    copies = []
    for part, at in zip(joint.parts, starts, strict=True):
        copy = nn.Parameter(whole[at : at + len(part)].copy_(part))
        copy.whole, copy.at = whole, at
        copies.append(copy)
    return copies


class _Rows(torch.autograd.Function):
    """Rows as they are, and their gradient for the parts that lie there."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *parts: Tensor) -> Tensor:
        """[n_rows, ...], of which the parts, each [n_i, ...], are the first -> the same."""
        ctx.sizes = [len(part) for part in parts]
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """[n_rows, ...] -> None, and that of each part."""
        return None, *grad[: sum(ctx.sizes)].split(ctx.sizes)
