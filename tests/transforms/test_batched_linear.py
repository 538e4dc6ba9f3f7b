"""Linear maps in batches: each alone, their gradients, and the order of a gradient's operands."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from wavelet_lm.transforms.batched_linear import batched_linear, linear_by_text


def inputs(n=3, dtype=torch.float64, with_bias=True):
    shapes = [(n, 6, 4), (n, 5, 4), (n, 5)]
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return tensors if with_bias else tensors[:2]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("with_bias", [True, False])
def test_each_is_a_linear_map_with_its_gradients(n, with_bias):
    given = inputs(n, with_bias=with_bias)
    expected = torch.stack([linear(*(part[i] for part in given)) for i in range(n)])
    torch.testing.assert_close(batched_linear(*given), expected)
    assert gradcheck(batched_linear, given)
    assert gradgradcheck(batched_linear, given)


def test_rows_may_stand_in_several_dimensions():
    x, weight, bias = inputs()
    given = x.detach().view(3, 2, 3, 4).requires_grad_(), weight, bias
    torch.testing.assert_close(
        batched_linear(*given).flatten(1, 2), batched_linear(x, weight, bias)
    )
    assert gradcheck(batched_linear, given)


def test_a_linear_layer_by_text():
    given = [part[0].detach().requires_grad_() for part in inputs()]
    given[0] = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(linear_by_text(*given), linear(*given))
    assert gradcheck(linear_by_text, given)


def test_what_is_frozen_has_no_gradient():
    for frozen in range(3):
        given = inputs()
        given[frozen].requires_grad_(False)
        batched_linear(*given).sum().backward()
        assert [tensor.grad is None for tensor in given] == [i == frozen for i in range(3)]


def test_autocast_multiplies_in_half_precision():
    x, weight, bias = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = batched_linear(x, weight, bias)
    y.float().sum().backward()
    alone = [linear(x[i].bfloat16(), weight[i].bfloat16(), bias[i].bfloat16()) for i in range(3)]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, torch.stack(alone), rtol=2e-2, atol=2e-2)
    assert all(tensor.grad.dtype == torch.float32 for tensor in (x, weight, bias))


def test_it_compiles_in_one_graph():
    given = inputs(dtype=torch.float32)
    compiled = torch.compile(batched_linear, backend="aot_eager", fullgraph=True)
    for one, other in zip(
        torch.autograd.grad(compiled(*given).square().sum(), given),
        torch.autograd.grad(batched_linear(*given).square().sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_gradient_of_the_output_is_the_first_operand():
    """The second one is where denormal numbers cost a CPU most."""
    given, seen = inputs(), []
    y = batched_linear(*given)
    grad = torch.full_like(y, 1e-310)

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "bmm" in str(function):
                seen.append([bool((arg.abs() == 1e-310).all()) for arg in args])
            return function(*args, **(kwargs or {}))

    with Recorder():
        y.backward(grad)
    assert seen == [[True, False], [True, False]]
