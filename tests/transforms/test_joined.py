"""Weights as rows of one tensor: the rows and gradients of weights that are put together."""

import pytest
import torch
from torch import nn

from wavelet_lm.transforms.joined import Joint, joined, laid_out


def weights(*sizes):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(n, 5)) for n in sizes]


def test_rows_that_are_laid_out_are_read_where_they_lie():
    parts = weights(2, 3, 1)
    copies = laid_out(Joint(parts, 8), torch.float32)
    whole = joined(copies, 8)
    assert torch.equal(whole, torch.cat([*parts, torch.zeros(2, 5)]))
    assert whole.data_ptr() == copies[0].data_ptr()
    assert joined(copies[1:]).data_ptr() == copies[1].data_ptr()
    with torch.no_grad():
        copies[2].fill_(7)  # as a step writes them
    assert (joined(copies)[-1] == 7).all()
    half = laid_out(Joint(parts), torch.bfloat16)
    assert torch.equal(joined(half), torch.cat(parts).bfloat16())


@pytest.mark.parametrize("n_rows", [None, 6, 9])
@pytest.mark.parametrize("chosen", [slice(None), slice(1, None), slice(0, 1)])
def test_gradients_are_those_of_a_concatenation(n_rows, chosen):
    parts = weights(2, 3, 1)
    copies = laid_out(Joint(parts, 9), torch.float32)
    n_rows = n_rows if chosen.start is None else None
    expected = torch.cat(parts[chosen])
    for given in (parts, copies):
        rows = joined(given[chosen], n_rows)
        padded = nn.functional.pad(expected, (0, 0, 0, len(rows) - len(expected)))
        assert torch.equal(rows, padded)
        (rows.sin() * torch.arange(1.0, len(rows) + 1)[:, None]).sum().backward()
    for part, copy in zip(parts[chosen], copies[chosen], strict=True):
        assert torch.equal(part.grad, copy.grad)
        assert part.grad.any()


def test_another_order_is_put_together_as_it_is_asked_for():
    parts = weights(2, 2, 2)
    first, second, third = laid_out(Joint(parts), torch.float32)
    (other,) = laid_out(Joint(parts[1:2]), torch.float32)
    for given in ([first, third], [second, first], [first, other], [third, first, second]):
        assert torch.equal(joined(given), torch.cat(given))


def test_compiled_it_is_the_same():
    copies = laid_out(Joint(weights(2, 3)), torch.float32)
    x = torch.randn(4, 5)

    def loss():
        return (x @ joined(copies).T).square().sum()

    loss().backward()
    expected = [copy.grad for copy in copies]
    for copy in copies:
        copy.grad = None
    torch.compile(loss, fullgraph=True, backend="aot_eager")().backward()
    for copy, grad in zip(copies, expected, strict=True):
        torch.testing.assert_close(copy.grad, grad)
