"""The norm's backward pass as one kernel beside its plain twin.

Without a GPU the comparisons run in Triton's interpreter, in a process of its own
(`test_in_the_interpreter`), and the kernel is compiled for the GPUs that it is meant for.
"""

import re

import pytest
import torch

from tests.kernels.interpreter import in_the_interpreter
from tests.kernels.test_triton_adagrad import DEVICE, INTERPRETED, compiles, on_a_device
from wavelet_lm.kernels.scale_norm import EPS, scale_norm_backward, scale_norm_backward_in_one

triton = pytest.importorskip("triton")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def operands(S, N, C, dtype, has_signal):
    generator = torch.Generator().manual_seed(N + C)

    def some(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    grad, x = some(S, N, C).to(dtype), (3 * some(S, N, C) + 2).to(dtype)
    return grad, x, some(S, C), some(N, C) if has_signal else None


@on_a_device
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("has_signal", [False, True])
@pytest.mark.parametrize("S, N, C", [(3, 150, 40), (1, 3, 7), (2, 70, 1024)])
def test_equals_the_twin(S, N, C, has_signal, dtype):
    from wavelet_lm.kernels.triton_scale_norm import launch

    given = operands(S, N, C, dtype, has_signal)
    wide = (None if g is None else g.double() for g in given)
    of_x, sums = scale_norm_backward(*wide)
    ours, parts = launch(*given, EPS, 5)
    assert ours.dtype == dtype and parts.shape == (5, 3 if has_signal else 2, S, C)
    assert (ours.double() - of_x).abs().max() < TOLERANCE[dtype] * of_x.abs().max()
    ours = parts.double().sum(0)
    assert (ours - sums.sum(0)).abs().max() < 2e-6 * sums.abs().max()


def test_the_twin_is_what_autograd_gives():
    S, N, C = 3, 10, 8
    grad, x, bias = torch.randn(3, S, N, C, dtype=torch.float64)
    x, bias = x.requires_grad_(), bias[:, 0].detach().requires_grad_()
    weight, gains = torch.randn(2, S, C, dtype=torch.float64).requires_grad_().unbind()
    signal = torch.randn(N, C, dtype=torch.float64)
    normal = torch.nn.functional.layer_norm(x, (C,))
    y = normal * weight[:, None] + bias[:, None] + gains[:, None] * signal
    of_x, *others = torch.autograd.grad(y, (x, weight, bias, gains), grad)
    ours, sums = scale_norm_backward(grad, x.detach(), weight.detach(), signal)
    torch.testing.assert_close(ours, of_x)
    torch.testing.assert_close(sums.sum(0), torch.stack(others))


def test_the_compiler_is_told_the_shapes():
    with torch.device("meta"):
        given = torch.empty(2, 3, 8), torch.empty(2, 3, 8), torch.empty(2, 8), None
    of_x, sums = scale_norm_backward_in_one(*given)
    assert of_x.shape == (2, 3, 8) and sums.shape == (1, 2, 2, 8)


@compiles
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
@pytest.mark.parametrize("C", [512, 2048])
def test_compiles_for_every_gpu(capability, C):
    """It reads eight numbers at once, and nothing is spilled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wavelet_lm.kernels.triton_scale_norm import _kernel, tile

    rows, columns, warps = tile(C)
    constants = {"ROWS": rows, "COLUMNS": columns}
    names = _kernel.arg_names
    types = {"weight_ptr": "*fp32", "added_ptr": "*fp32", "sums_ptr": "*fp32"}
    types |= {"N": "i32", "C": "i32", "eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        _kernel,
        {name: types.get(name, "*bf16") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name in names
            if name not in constants and name != "eps"
        },
    )
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 2
    assert ".local" not in ptx


@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="the tests above run in this process"
)
def test_in_the_interpreter():
    said = in_the_interpreter(__file__)
    assert re.search(r"2\d passed", said), said[-400:]
