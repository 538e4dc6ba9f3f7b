"""What a read of the delta memory is made of, against the recurrence itself."""

import torch
from torch.nn.functional import normalize

from wavelet_lm.kernels.delta_rule import recurrent
from wavelet_lm.models.wavelet_lm.delta_memory import RuleInputs
from wavelet_lm.scope.recall import contributions, shares

T, HEADS, DK, DV = 9, 2, 3, 4


def drawn() -> tuple[RuleInputs, torch.Tensor]:
    def normal(*shape):
        return torch.randn(1, *shape, dtype=torch.float64)

    q, k = normalize(normal(T, HEADS, DK), dim=-1), normalize(normal(T, HEADS, DK), dim=-1)
    rates = -normal(T, HEADS).exp(), normal(T, HEADS).sigmoid()
    return RuleInputs(q, k, normal(T, HEADS, DV), *rates), normal(HEADS, DK, DV)


def test_the_summands_make_what_the_recurrence_reads():
    inputs, before = drawn()
    y, _ = recurrent(*inputs, before)
    c, p = contributions(inputs)
    summed = torch.einsum("hts,shv->thv", c, inputs.v[0])
    summed += torch.einsum("thk,hkv->thv", p, before[0])
    torch.testing.assert_close(summed, y[0])
    assert not c.triu(1).any()


def test_a_coefficient_is_how_far_a_read_follows_a_value():
    inputs, before = drawn()
    c, _ = contributions(inputs)
    y, _ = recurrent(*inputs, before)
    for s in range(T):
        v = inputs.v.clone()
        v[0, s] += 1
        changed, _ = recurrent(*inputs._replace(v=v), before)
        expected = c[:, :, s].T[..., None].expand(T, HEADS, DV)
        torch.testing.assert_close((changed - y)[0], expected)


def test_shares_are_of_the_whole():
    inputs, before = drawn()
    found, old = shares(inputs, before)
    torch.testing.assert_close(found.sum(-1) + old, torch.ones(HEADS, T, dtype=torch.float64))
    assert (old > 0).all()
    found, old = shares(inputs, None)
    torch.testing.assert_close(found.sum(-1), torch.ones(HEADS, T, dtype=torch.float64))
    assert not old.any()


def test_of_nothing_there_are_no_shares():
    inputs, _ = drawn()
    found, old = shares(inputs._replace(v=torch.zeros_like(inputs.v)), None)
    assert not found.any()
    assert not old.any()
