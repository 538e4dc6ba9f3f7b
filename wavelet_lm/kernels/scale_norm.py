"""The backward pass of a LayerNorm of its own for each scale, with all that reads its gradient."""

import torch
from torch import Tensor

EPS = 1e-5
# Of rows, for each scale: the sums over all rows are as many parts.
MOST_PROGRAMS = 64


def scale_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of w_s ⊙ x̂ + b_s + a_s ⊙ m, with x̂ = (x − mean) / std over the last dimension.

    It defines the kernel, and stands in for it.

    Args:
        grad: that of the result, [S, N, C].
        x: [S, N, C].
        weight: w [S, C].
        added: m [N, C], or None without it.

    Returns:
        That of x, in its shape and dtype, and sums over the rows, [parts, 2 or 3, S, C] in float32
        at least, that add up to those of w, b and, with m, of a.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    grad, wide = grad.to(dtype), x.to(dtype)
    variance, mean = torch.var_mean(wide, -1, unbiased=False, keepdim=True)
    scale = (variance + EPS).rsqrt()
    normal = (wide - mean) * scale
    u = grad * weight[:, None]
    of_x = scale * (u - u.mean(-1, keepdim=True) - normal * (u * normal).mean(-1, keepdim=True))
    sums = [(grad * normal).sum(1), grad.sum(1)]
    if added is not None:
        sums.append((grad * added.to(dtype)).sum(1))
    return of_x.to(x.dtype), torch.stack(sums)[None]


@torch.library.custom_op("wavelet_lm::scale_norm_backward", mutates_args=())
def scale_norm_backward_in_one(
    grad: Tensor, x: Tensor, weight: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`scale_norm_backward` in one launch on a GPU: shapes as there."""
    if not x.is_cuda or x.dtype == torch.float64:
        return scale_norm_backward(grad, x, weight, added)
    from wavelet_lm.kernels.triton_scale_norm import launch  # a compiled step on a GPU has triton

    return launch(grad, x, weight, added, EPS, n_parts(x))


@scale_norm_backward_in_one.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    n_sums = 2 if added is None else 3
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.empty_like(x), weight.new_empty(n_parts(x), n_sums, *weight.shape, dtype=dtype)


def n_parts(x: Tensor) -> int:
    """Of the sums over the rows of x [S, N, C]."""
    return min(MOST_PROGRAMS, x.shape[1]) if x.is_cuda and x.dtype != torch.float64 else 1
