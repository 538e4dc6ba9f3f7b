"""The head's loss of a CPU against torch's cross-entropy, in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from wavelet_lm.kernels import linear_cross_entropy as blocks


def data(dtype=torch.float64):
    return (
        torch.randn(13, 5, dtype=dtype, requires_grad=True),
        torch.randn(7, 5, dtype=dtype, requires_grad=True),
        torch.randint(7, (13,)),
    )


def plain(hidden, weight, targets):
    total = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    return total, *torch.autograd.grad(total, (hidden, weight))


def assert_equal(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("logits", [1, 30, 10**6])
def test_equals_torch(monkeypatch, logits):
    monkeypatch.setattr(blocks, "LEAST_ROWS", 1)
    monkeypatch.setattr(blocks, "BLOCK_LOGITS", logits)
    inputs = data()
    with torch.no_grad():
        got = blocks.linear_cross_entropy(*inputs)
    assert_equal(got, plain(*inputs))


def test_a_target_of_no_probability_has_its_loss():
    """e^-200 is no number of float32, and 200 is."""
    hidden = torch.tensor([[1.0], [0.5]], requires_grad=True)
    weight = torch.tensor([[200.0], [0.0]], requires_grad=True)
    targets = torch.tensor([1, 0])
    with torch.no_grad():
        total, grad_hidden, grad_weight = blocks.linear_cross_entropy(hidden, weight, targets)
    assert total.item() == 200
    assert grad_hidden.tolist() == [[200.0], [0.0]]
    assert grad_weight.tolist() == [[1.0], [-1.0]]


def test_what_is_no_number_stays_none():
    hidden, weight, targets = data(torch.float32)
    with torch.no_grad():
        hidden[3, 0] = torch.nan
        total, grad_hidden, _ = blocks.linear_cross_entropy(hidden, weight, targets)
    assert total.isnan()
    assert grad_hidden[3].isnan().all() and grad_hidden[:3].isfinite().all()


def test_half_precision_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr(blocks, "LEAST_ROWS", 1)
    monkeypatch.setattr(blocks, "BLOCK_LOGITS", 30)
    halves = [x.detach().bfloat16() if x.is_floating_point() else x for x in data()]
    total, grad_hidden, grad_weight = blocks.linear_cross_entropy(*halves)
    dtypes = total.dtype, grad_hidden.dtype, grad_weight.dtype
    assert dtypes == (torch.float32, torch.bfloat16, torch.float32)
    wide = [x.double().requires_grad_() if x.is_floating_point() else x for x in halves]
    expected = plain(*wide)
    for a, b in zip((total, grad_hidden, grad_weight), expected, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_compiled_step_calls_the_same():
    inputs = [x.detach() for x in data(torch.float32)]
    compiled = torch.compile(blocks.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*inputs), blocks.linear_cross_entropy(*inputs), rtol=0, atol=0)
    torch.library.opcheck(torch.ops.wavelet_lm.linear_cross_entropy.default, tuple(inputs))


@pytest.mark.parametrize(
    "n, n_vocab, rows",
    [(2048, 256, 2048), (2048, 8000, 256), (2048, 50257, 128), (100, 50257, 100), (0, 7, 1)],
)
def test_blocks_are_few_and_equal(n, n_vocab, rows):
    assert blocks.block_rows(n, n_vocab, blocks.BLOCK_LOGITS) == rows
