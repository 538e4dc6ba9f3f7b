"""Cross-entropy of a linear head on a CPU with its gradients, in blocks that its caches hold.

A block of logits is projected, turned into probabilities and multiplied twice before the next one
takes its place in memory. torch's softmax takes one exponential of each logit; what torch.compile
writes of the same formula takes two, and reads each block anew.
"""

import math

import torch
from torch import Tensor

# Logits of a block: 8 MiB in float32. With fewer rows than the least, what every block adds to,
# the head's gradient [V, C], would take longer to read and write than its products.
BLOCK_LOGITS, LEAST_ROWS = 2**21, 128

Result = tuple[Tensor, Tensor, Tensor]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Result:
    """The sum over n of −log softmax(h_n Wᵀ)[target_n], and its gradients.

    Args:
        hidden: h [N, C]; weight: W [V, C], of h's dtype; targets: [N] int64.

    Returns:
        The sum, 0-d, and the gradients of h [N, C], of its dtype, and of W [V, C]. The sum and W's
        gradient are float32 (float64 for float64 input).
    """
    # In a compiled step it is an operator, which the compiler leaves as it is.
    function = _operator if torch.compiler.is_compiling() else _in_blocks
    return function(hidden, weight, targets)


def _in_blocks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Result:
    total, grad_hidden, grad_weight = _empty_result(hidden, weight, targets)
    total.zero_()
    rows = block_rows(len(hidden), len(weight), BLOCK_LOGITS)
    shape = rows, len(weight)
    logits, probabilities = (total.new_empty(shape) for _ in range(2))
    for start in range(0, len(hidden), rows):
        h, t = hidden[start : start + rows], targets[start : start + rows]
        x, p = logits[: len(h)], probabilities[: len(h)]
        if h.dtype == x.dtype:
            torch.mm(h, weight.T, out=x)
        else:
            x.copy_(h @ weight.T)
        torch.softmax(x, -1, out=p)
        log_norm = x.amax(-1) - p.amax(-1).log()  # of the likeliest, whose p is no less than 1 / V
        total += (log_norm - x.gather(-1, t[:, None])[:, 0]).sum()
        p.scatter_add_(-1, t[:, None], p.new_full((len(h), 1), -1.0))
        d_logits = p.to(h.dtype)
        torch.mm(d_logits, weight, out=grad_hidden[start : start + rows])
        if h.dtype != x.dtype:
            of_block = d_logits.T @ h
            grad_weight = grad_weight.add_(of_block) if start else grad_weight.copy_(of_block)
        elif start:
            grad_weight.addmm_(d_logits.T, h)
        else:
            torch.mm(d_logits.T, h, out=grad_weight)
    return total, grad_hidden, grad_weight


def block_rows(n: int, n_vocab: int, logits: int) -> int:
    """The rows of one of as few equal blocks of n rows as there can be, each of so many logits."""
    most = max(LEAST_ROWS, logits // n_vocab)
    return max(1, math.ceil(n / max(1, math.ceil(n / most))))


def _empty_result(hidden: Tensor, weight: Tensor, targets: Tensor) -> Result:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    total = hidden.new_empty((), dtype=wide)
    return total, torch.empty_like(hidden), torch.empty_like(weight, dtype=wide)


# Defined piece by piece: torch.library.custom_op loads the compiler at its first call, which takes
# seconds.
torch.library.define(
    "wavelet_lm::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("wavelet_lm::linear_cross_entropy", "CPU")(_in_blocks)
torch.library.register_fake("wavelet_lm::linear_cross_entropy")(_empty_result)
_operator = torch.ops.wavelet_lm.linear_cross_entropy.default
