"""Which earlier tokens a delta memory finds when it is read, exactly.

With S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ unrolled, what position t reads is

    y_t = Σ_{s≤t} c_ts v_s + S_0ᵀ p_t,      c_ts = β_s k_sᵀ p_ts
    p_tt = q_t,   p_t(s−1) = α_s (I − β_s k_s k_sᵀ) p_ts,   p_t = p_t(−1)

a sum of the values that earlier positions have written, each as far as it has neither faded nor
been overwritten, and of what was known before the first of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wavelet_lm.models.wavelet_lm.delta_memory import RuleInputs


def contributions(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    """The coefficients of one text's values in what is read, in float64.

    Args:
        inputs: of one text, B = 1 and T positions.

    Returns:
        c [heads, T, T]: of the value of position s (column) in the read of position t (row), zero
        above the diagonal; and p [T, heads, dk], which read the memory of before these positions.
    """
    q, k, _, log_decay, beta = (x[0].double() for x in inputs)
    T, heads, _ = q.shape
    decay, p = log_decay.exp(), q.clone()
    c = q.new_zeros(heads, T, T)
    for s in reversed(range(T)):
        reading = p[s:]  # of position s and all that follow it
        along = (reading * k[s]).sum(-1)
        written = beta[s] * along
        c[:, s:, s] = written.T
        reading -= written[..., None] * k[s]
        reading *= decay[s, :, None]
    return c, p


def shares(inputs: RuleInputs, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """How much of a read comes from where, by the lengths of the summands.

    Args:
        inputs: of one text, B = 1 and T positions.
        before: the memory before them, [1, heads, dk, dv]; None where there was none.

    Returns:
        [heads, T, T]: the share of position s (column) in the read of position t (row); and
        [heads, T], the share of all that was before. They sum to 1, or are 0 where nothing is read.
    """
    c, p = contributions(inputs)
    values = inputs.v[0].double()
    sizes = c.abs() * values.norm(dim=-1).T[:, None]
    old = sizes.new_zeros(sizes.shape[:2])
    if before is not None:
        old = torch.einsum("thk,hkv->htv", p, before[0].double()).norm(dim=-1)
    total = sizes.sum(-1) + old
    total = total.where(total > 0, 1)
    return sizes / total[..., None], old / total
