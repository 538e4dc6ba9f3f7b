"""Linear maps of one shape, each on its part of a signal, in products of all of them at once."""

from __future__ import annotations

import torch
from torch import Tensor

from wavelet_lm.transforms.dtypes import as_factor


def products_stand_alone(x: Tensor) -> bool:
    """Whether products of one shape with x, of any shape, cost less one by one than as a batch.

    So they do in a compiled step on a CPU: its library's products in batches are slower, and the
    compiler has what goes in written together first. Elsewhere a batch saves launches.
    """
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x_i W_iᵀ + b_i for x [n, ..., in], W [n, out, in], b [n, out] -> [n, ..., out]."""
    if len(x) == 1:  # the compiler leaves a batch of one a batch
        return torch.nn.functional.linear(x[0], weight[0], None if bias is None else bias[0])[None]
    bias = None if bias is None else as_factor(bias)
    return BatchedLinear.apply(as_factor(x), as_factor(weight), bias)


class BatchedLinear(torch.autograd.Function):
    """x_i W_iᵀ + b_i, with gᵀ x for the gradient of W, as that of a single linear layer is.

    PyTorch's own, of a batch, is xᵀ g. Where gates saturate, g has denormal numbers, and a CPU's
    library takes ten times as long for a product that has them in its second operand.

    The gradient of b is summed as `summed` does.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[n, ..., in], [n, out, in], [n, out] -> [n, ..., out]."""
        ctx.save_for_backward(x, weight)
        rows = x.flatten(1, -2)
        if bias is None:
            y = torch.bmm(rows, weight.mT)
        else:
            y = torch.baddbmm(bias[:, None], rows, weight.mT)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """[n, ..., out] -> [n, ..., in], [n, out, in], [n, out]."""
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(1, -2)
        return (
            torch.bmm(rows, weight).view_as(x) if for_x else None,
            torch.bmm(rows.mT, x.flatten(1, -2)) if for_weight else None,
            summed(grad, 2) if for_bias else None,
        )


def linear_by_text(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b of x [B, T, in], W [out, in], b [out] -> [B, T, out]."""
    return LinearByText.apply(*map(as_factor, (x, weight, bias)))


class LinearByText(torch.autograd.Function):
    """x Wᵀ + b, with a bias's gradient that is summed as `summed` does."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[B, T, in], [out, in], [out] -> [B, T, out]."""
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x.flatten(0, 1), weight.T).view(*x.shape[:2], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, out] -> [B, T, in], [out, in], [out]."""
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, 1)
        return (rows @ weight).view_as(x), rows.T @ x.flatten(0, 1), summed(grad, 1)


def summed(x: Tensor, n_left: int) -> Tensor:
    """x [..., C] over all dimensions but the last and the first of `n_left`, one after the other.

    For a GPU the compiler takes the first of these sums where it makes what is summed. Of many rows
    at once it makes groups, and then finds no common order of the loops.
    """
    while x.ndim > n_left:
        x = x.sum(-2)
    return x
