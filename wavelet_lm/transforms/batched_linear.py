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
    """x_i W_iᵀ + b_i for rows x [n, N, in], W [n, out, in], b [n, out] -> [n, N, out]."""
    if len(x) == 1:  # the compiler leaves a batch of one a batch
        return torch.nn.functional.linear(x[0], weight[0], None if bias is None else bias[0])[None]
    bias = None if bias is None else as_factor(bias)
    return BatchedLinear.apply(as_factor(x), as_factor(weight), bias)


class BatchedLinear(torch.autograd.Function):
    """x_i W_iᵀ + b_i, with gᵀ x for the gradient of W, as that of a single linear layer is.

    PyTorch's own, of a batch, is xᵀ g. Where gates saturate, g has denormal numbers, and a CPU's
    library takes ten times as long for a product that has them in its second operand.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[n, N, in], [n, out, in], [n, out] -> [n, N, out]."""
        ctx.save_for_backward(x, weight)
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """[n, N, out] -> [n, N, in], [n, out, in], [n, out]."""
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight) if for_x else None,
            torch.bmm(grad.mT, x) if for_weight else None,
            grad.sum(1) if for_bias else None,
        )
