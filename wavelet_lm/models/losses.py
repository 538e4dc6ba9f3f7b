"""Cross-entropy of a linear head over a large vocabulary, in chunks of positions.

The logits of all positions never stand in memory: each chunk is projected, reduced and, in
training, differentiated at once, which costs no recomputation.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from wavelet_lm.kernels.linear_cross_entropy import (
    BLOCK_LOGITS,
    block_rows,
    linear_cross_entropy,
)
from wavelet_lm.transforms.joined import joined

# Where gradients are taken by `linear_cross_entropy`: its blocks suit a CPU's caches.
IN_BLOCKS = {"cpu"}
# The logits that may stand at once, in elements: on a CPU as in a block, on a GPU enough rows for
# full matrix tiles (128 MiB in float32). With gradients there are more of them there (512 MiB in
# bfloat16), since every further chunk reads and writes the head's whole gradient again.
CHUNK_ELEMENTS = {"cpu": BLOCK_LOGITS, "cuda": 2**25}
GRADIENT_CHUNK_ELEMENTS = {"cuda": 2**28}
# A GPU multiplies matrices of whole tiles; the rows that are added to the head are never an answer.
VOCAB_MULTIPLE = {"cuda": 64}


def n_padded(weight: Tensor) -> int:
    """The rows of a head W [V, C] with those that are added to it where it is trained."""
    n_vocab = len(weight)
    return n_vocab + -n_vocab % VOCAB_MULTIPLE.get(weight.device.type, 1)


def token_cross_entropy(
    hidden: Tensor, project: Callable[[Tensor], Tensor], n_vocab: int, targets: Tensor
) -> Tensor:
    """−log softmax(project(h))[target] for every position, without gradients.

    Args:
        hidden: [N, C]; project: [n, C] -> logits [n, n_vocab]; targets: [N] int64.

    Returns:
        [N] nats, float32 (float64 for float64 input).
    """
    losses = [
        nn.functional.cross_entropy(_wide(project(h)), t, reduction="none")
        for h, t in _chunks(hidden, n_vocab, targets, CHUNK_ELEMENTS)
    ]
    return torch.cat(losses)


def mean_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the logits h Wᵀ, a 0-d tensor, with gradients for h and W.

    Args:
        hidden: [N, C]; weight: W [V, C]; targets: [N] int64.
    """
    if torch.is_grad_enabled() and hidden.device.type in IN_BLOCKS:
        return _MeanInBlocks.apply(hidden, weight, targets)
    if torch.is_grad_enabled():
        padded = joined([weight], n_padded(weight))
        return _MeanCrossEntropy.apply(hidden, padded, len(weight), targets)
    return token_cross_entropy(hidden, lambda h: h @ weight.T, len(weight), targets).mean()


class _MeanInBlocks(torch.autograd.Function):
    """Of `linear_cross_entropy`, whose gradients backward multiplies by the incoming one over N."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device, dtype = _autocast(hidden)
        with torch.autocast(device, enabled=False):
            total, *grads = linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets)
        ctx.save_for_backward(*grads)
        ctx.n, ctx.dtypes = len(targets), (hidden.dtype, weight.dtype)
        return total / ctx.n

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_output / ctx.n
        of_hidden, of_weight = ctx.dtypes
        return grad_hidden.to(of_hidden) * scale, (grad_weight * scale).to(of_weight), None


class _MeanCrossEntropy(torch.autograd.Function):
    """Both gradients are taken per chunk in the forward pass, while its logits exist.

    They are kept unscaled (∂/∂logits = softmax − onehot), so that nothing underflows in half
    precision; backward multiplies by the incoming gradient over N. In half precision the logits'
    gradient of a single chunk is kept in place of the weight's, which backward takes in one product
    with what is scaled, the smaller factor.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, n_vocab: int, targets: Tensor) -> Tensor:
        device, dtype = _autocast(hidden)
        w = weight.to(dtype)
        total = torch.zeros((), dtype=_wide(hidden).dtype, device=hidden.device)
        grads_hidden: list[Tensor] = []
        grads_weight: list[Tensor] = []
        with torch.autocast(device, enabled=False):
            chunks = [*_chunks(hidden.to(dtype), n_vocab, targets, GRADIENT_CHUNK_ELEMENTS)]
            ctx.is_late = len(chunks) == 1 and dtype in (torch.bfloat16, torch.float16)
            for h, t in chunks:
                logits = _wide(h @ w.T)
                if len(w) > n_vocab:
                    logits[:, n_vocab:] = -torch.inf
                log_norm = logits.logsumexp(-1, keepdim=True)
                total += (log_norm - logits.gather(-1, t[:, None])).sum()
                grad = _less_one_hot(logits.sub_(log_norm).exp_(), t).to(dtype)
                grads_hidden.append(grad @ w)
                if not ctx.is_late:
                    _add_product(grads_weight, grad.T, h)
        of_weight = [grad, h] if ctx.is_late else grads_weight
        ctx.save_for_backward(torch.cat(grads_hidden), *of_weight)
        ctx.n, ctx.dtypes = len(targets), (hidden.dtype, weight.dtype)
        return total / ctx.n

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, *saved = ctx.saved_tensors
        scale = grad_output / ctx.n
        of_hidden, of_weight = ctx.dtypes
        if ctx.is_late:
            grad, h = saved
            grad_weight = (grad.T @ (h * scale)).to(of_weight)
        else:
            grad_weight = (sum(map(_wide, saved)) * scale).to(of_weight)
        return grad_hidden.to(of_hidden) * scale, grad_weight, None, None


def _autocast(hidden: Tensor) -> tuple[str, torch.dtype]:
    """The device that autocast is asked for, and the dtype in which it would multiply."""
    device = "cpu" if hidden.is_meta else hidden.device.type  # autocast knows no meta device
    if torch.is_autocast_enabled(device):
        return device, torch.get_autocast_dtype(device)
    return device, hidden.dtype


def _less_one_hot(p: Tensor, targets: Tensor) -> Tensor:
    """p [n, V] less 1 at the targets [n]; it may change p."""
    if (
        torch.compiler.is_compiling()
    ):  # a comparison becomes part of what made p, a scatter does not
        columns = torch.arange(p.shape[1], device=p.device)
        return p - (columns == targets[:, None]).to(p.dtype)
    return p.scatter_add_(-1, targets[:, None], -torch.ones_like(p[:, :1]))


def _add_product(summands: list[Tensor], a: Tensor, b: Tensor) -> None:
    """One more product a b of a sum; those in half precision are added up where the sum is read."""
    if summands and a.dtype == _wide(a).dtype:
        summands[0].addmm_(a, b)
    else:
        summands.append(a @ b)


def _chunks(
    hidden: Tensor, n_vocab: int, targets: Tensor, elements: dict[str, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """h [N, C] and targets [N] in chunks whose logits have about so many elements on a device."""
    n = block_rows(len(targets), n_vocab, elements.get(hidden.device.type, 2**23))
    return zip(hidden.split(n), targets.split(n), strict=True)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
