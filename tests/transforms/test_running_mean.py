import torch
from hypothesis import given
from hypothesis import strategies as st

from wavelet_lm.transforms.means import running_mean


def test_equals_slow_loop():
    x = torch.randn(2, 30, 3, dtype=torch.float64)
    means, _ = running_mean(x)
    for t in range(30):
        torch.testing.assert_close(means[:, t], x[:, : t + 1].mean(1), rtol=0, atol=1e-13)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_any_chunks(lengths):
    x = torch.randn(2, sum(lengths), 3, dtype=torch.float64)
    whole, end = running_mean(x)
    state, parts = None, []
    for chunk in x.split(lengths, dim=1):
        means, state = running_mean(chunk, state)
        parts.append(means)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.total, end.total, rtol=0, atol=1e-12)
    assert torch.equal(state.count, end.count)


def test_half_precision_accumulates_in_float32():
    """A mean of 5,000 times 1.001 would drift by whole units if it were summed in bfloat16."""
    x = torch.full((1, 5000, 1), 1.001, dtype=torch.bfloat16)
    means, state = running_mean(x)
    assert means.dtype == torch.bfloat16
    assert state.total.dtype == torch.float32
    assert torch.equal(means, x)


def test_past_positions_do_not_see_the_future():
    x = torch.randn(1, 20, 2)
    y = x.clone()
    y[:, 12:] += 1
    assert torch.equal(running_mean(x)[0][:, :12], running_mean(y)[0][:, :12])
