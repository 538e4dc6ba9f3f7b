import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from wavelet_lm.transforms.means import ExponentialMean, linear_recurrence


def make(C: int = 3) -> ExponentialMean:
    return ExponentialMean(C).double()


def test_equals_slow_loop():
    mean = make()
    x = torch.randn(2, 37, 3, dtype=torch.float64)
    alpha = mean.decay(x).sigmoid()
    total = weight = torch.zeros(2, 3, dtype=torch.float64)
    got, _ = mean(x)
    for t in range(37):
        total = alpha[:, t] * total + (1 - alpha[:, t]) * x[:, t]
        weight = alpha[:, t] * weight + (1 - alpha[:, t])
        torch.testing.assert_close(got[:, t], total / weight, rtol=0, atol=1e-12)


def test_a_constant_keeps_its_value_from_the_first_position_on():
    """No bias towards zero at the start, and none in half precision where decay is slow."""
    mean = ExponentialMean(2).to(torch.bfloat16)
    with torch.no_grad():
        mean.decay.weight.zero_()
        mean.decay.bias.fill_(7.0)  # α = 0.9991: 1 − α computed in bfloat16 would be 0
    x = torch.full((1, 50, 2), 1.5, dtype=torch.bfloat16)
    assert torch.equal(mean(x)[0], x)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_any_chunks(lengths):
    mean = make()
    x = torch.randn(2, sum(lengths), 3, dtype=torch.float64)
    whole, end = mean(x)
    state, parts = None, []
    for chunk in x.split(lengths, dim=1):
        means, state = mean(chunk, state)
        parts.append(means)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.mean, end.mean, rtol=0, atol=1e-12)


def test_the_future_changes_no_bit():
    mean = make()
    x = torch.randn(1, 20, 3, dtype=torch.float64)
    y = x.clone()
    y[:, 12:] += 1
    assert torch.equal(mean(x)[0][:, :12], mean(y)[0][:, :12])


def test_gradient():
    a = torch.rand(1, 7, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 1, 7, 2, dtype=torch.float64, requires_grad=True)
    initial = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(linear_recurrence, (a, b, initial))


def test_decays_that_are_one_leave_the_plain_mean():
    """Weights of which none is left in float32, from the first position on."""
    mean = ExponentialMean(3)
    with torch.no_grad():
        mean.decay.weight.zero_()
        mean.decay.bias.fill_(200.0)
    x = torch.randn(2, 9, 3)
    expected = x.cumsum(1) / torch.arange(1, 10)[:, None]
    found, state = mean(x[:, :4])
    torch.testing.assert_close(found, expected[:, :4])
    torch.testing.assert_close(mean(x[:, 4:], state)[0], expected[:, 4:])
