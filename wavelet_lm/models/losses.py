"""Cross-entropy of a linear head over a large vocabulary, in chunks of positions.

The logits of all positions never stand in memory: each chunk is projected, reduced and, in
training, differentiated at once, which costs no recomputation.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Logits that may stand at once, in elements: on a CPU what its caches hold, on a GPU enough rows
# for full matrix tiles (128 MiB in float32).
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**25}


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
        for h, t in _chunks(hidden, n_vocab, targets)
    ]
    return torch.cat(losses)


def mean_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the logits h Wᵀ, a 0-d tensor, with gradients for h and W.

    Args:
        hidden: [N, C]; weight: W [V, C]; targets: [N] int64.
    """
    if torch.is_grad_enabled():
        return _MeanCrossEntropy.apply(hidden, weight, targets)
    return token_cross_entropy(hidden, lambda h: h @ weight.T, len(weight), targets).mean()


class _MeanCrossEntropy(torch.autograd.Function):
    """Both gradients are taken per chunk in the forward pass, while its logits exist.

    They are kept unscaled (∂/∂logits = softmax − onehot), so that nothing underflows in half
    precision; backward multiplies by the incoming gradient over N.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        w = weight.to(dtype)
        total = torch.zeros((), dtype=_wide(hidden).dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        start = 0
        with torch.autocast(device, enabled=False):
            for h, t in _chunks(hidden.to(dtype), len(weight), targets):
                logits = _wide(h @ w.T)
                log_norm = logits.logsumexp(-1, keepdim=True)
                total += (log_norm - logits.gather(-1, t[:, None])).sum()
                grad = logits.sub_(log_norm).exp_()
                grad.scatter_add_(-1, t[:, None], -torch.ones_like(log_norm))
                grad = grad.to(dtype)
                grad_hidden[start : start + len(t)] = grad @ w
                if dtype == grad_weight.dtype:
                    grad_weight.addmm_(grad.T, h)
                else:
                    grad_weight += grad.T @ h
                start += len(t)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.n = len(targets)
        return total / ctx.n

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_output / ctx.n
        return grad_hidden * scale, grad_weight * scale, None


def _chunks(hidden: Tensor, n_vocab: int, targets: Tensor):
    n = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 2**23) // n_vocab)
    return zip(hidden.split(n), targets.split(n), strict=True)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
