"""Matrix products: FLOPs of a training token, and how fast a machine computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from report import Clock
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PROBE = 384  # rows and columns of the products that tell the machine's speed
PROBE_REPEATS = 4


def matrix_rate(
    device: torch.device, dtype: torch.dtype = torch.float32, size: int = PROBE
) -> float:
    """FLOP/s of products of size × size matrices now, by the `Clock` of the device."""
    a, b = torch.ones(2, size, size, device=device, dtype=dtype).unbind()
    clock = Clock(device)
    a @ b
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with clock.running():
        for _ in range(PROBE_REPEATS):
            a @ b
    return 2 * size**3 * PROBE_REPEATS / max(clock.seconds, 1e-9)


def flops_per_token(model: nn.Module, context: int) -> int:
    """FLOPs of the matrix products of one training token, as they are computed.

    A step is counted product by product, with attention as the two that it consists of, and with
    the project's kernels.
    """
    device = next(model.parameters()).device
    idx = torch.zeros(1, context, dtype=torch.int64, device=device)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=_formulas()) as counter,
    ):
        loss, _ = model.loss(idx, idx)
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return counter.get_total_flops() // context


def _formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of the operations that PyTorch's counter does not know, from their inputs' shapes."""

    def product(_: Any, a: Any, b: Any, *args: Any, **options: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    def delta_rule(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> int:
        """Of one token and head: what the state knows of k, what is written, what q reads."""
        B, T, H, dk = q
        return 3 * 2 * B * T * H * dk * v[-1]

    def delta_rule_backward(*args: Any, **options: Any) -> int:
        return 2 * delta_rule(*args)

    formulas: dict[Any, Callable[..., int]] = {torch.ops.aten.addmm_: product}
    for formula in (delta_rule, delta_rule_backward):
        if hasattr(torch.ops.wavelet_lm, formula.__name__):
            formulas[getattr(torch.ops.wavelet_lm, formula.__name__)] = formula
    return formulas
