"""All levels of a lifting wavelet for the next position of one text.

From the signal c_0 and its delayed past, level by level (`transforms/lifting.py`):

    d_k     = (past_k − P_k(c_k)) / √2
    c_{k+1} = (c_k + U_k(d_k)) / √2

with nets P and U of one matrix, or of two with a GELU between. The past is that of positions
before: it is known of all levels when the step begins.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear


def lifting_step(
    x: Tensor, pasts: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The step, product by product: what defines the kernel, and stands in for it.

    Args:
        x: c_0, [C].
        pasts: [L, C], level by level.
        weights, biases: of P_0, U_0, P_1, … in turn, [C, C] and [C]; or, of two layers each, [H, C]
            and [H], [C, H] and [C].

    Returns:
        The approximations c_1 … c_L and the details d_0 … d_{L−1}, each [L, C], in x's dtype.
    """
    n = len(weights) // len(pasts)
    layers = list(zip(weights, biases, strict=True))
    nets = [layers[i : i + n // 2] for i in range(0, len(layers), n // 2)]

    def run(net: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
        first, *rest = net
        x = linear(x, *first)
        for layer in rest:
            x = linear(gelu(x), *layer)
        return x

    approximations, details = [], []
    for past, predict, update in zip(pasts, nets[::2], nets[1::2], strict=True):
        details.append((past - run(predict, x)) / math.sqrt(2))
        x = (x + run(update, details[-1])) / math.sqrt(2)
        approximations.append(x)
    return torch.stack(approximations), torch.stack(details)


@torch.library.custom_op("wavelet_lm::lifting_step", mutates_args=())
def lifting_step_in_one(
    x: Tensor, pasts: Tensor, weights: list[Tensor], biases: list[Tensor], arrivals: Tensor
) -> tuple[Tensor, Tensor]:
    """`lifting_step` in one launch on a GPU: shapes and results as there.

    An operator of its own, which torch.compile takes as it is.

    arrivals: one int32 that no other step uses at the same time, 0 before and after it, by which
        its programs wait for each other.
    """
    if not x.is_cuda:
        return lifting_step(x, pasts, weights, biases)
    from wavelet_lm.kernels.triton_lifting import launch  # a compiled step on a GPU has triton

    return launch(x, pasts, weights, biases, arrivals)


@lifting_step_in_one.register_fake
def _(
    x: Tensor, pasts: Tensor, weights: list[Tensor], biases: list[Tensor], arrivals: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pasts), torch.empty_like(pasts)
