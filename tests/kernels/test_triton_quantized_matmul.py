"""The Triton kernels beside their definition, on a GPU or, elsewhere, in Triton's interpreter.

Triton decides when it is imported whether it interprets: without a GPU these tests run in a process
of their own, which `test_in_the_interpreter` starts.
"""

import os

import pytest
import torch

from tests.kernels.interpreter import in_the_interpreter
from tests.kernels.test_quantized_matmul import largest_error, quantized
from wavelet_lm.kernels.quantized_matmul import quantized_matmul

pytest.importorskip("triton")
MAX_REDUCED_ROWS = 2  # above, matrix units

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_a_device = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA GPU or the interpreter"
)
# Of |x| |w|, by what x and y are rounded to: nothing else is.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def product(x, codes, scales, bits, group_size):
    return torch.ops.wavelet_lm.quantized_matmul(x, codes, scales, bits, group_size)


def check(y, x, *weights):
    assert y.dtype == x.dtype
    assert largest_error(y, x, *weights) < TOLERANCE[y.dtype]


@on_a_device
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bits, group_size", [(8, 0), (4, 32), (4, 48), (2, 16), (2, 64)])
def test_equals_the_definition(bits, group_size, dtype, monkeypatch):
    """One batch of every kind: whole tiles, odd sizes, ends of groups, several blocks."""
    kernels = pytest.importorskip("wavelet_lm.kernels.triton_quantized_matmul")
    monkeypatch.setattr(kernels, "FULL_GRID", 1)  # tiles of many rows for few rows, too
    sizes = [(1, 1, 16, 64), (2, 2, 5, 33), (1, 3, 9, 130), (2, 9, 17, 290), (1, 1, 9, 4200)]
    if dtype == torch.float32:
        sizes += [(3, 7, 33, 100), (1, 2, 1, 1), (1, 16, 8, 257), (1, 2, 3, 2048)]
    for n, M, N, K in sizes:
        if INTERPRETED and dtype == torch.bfloat16 and M > MAX_REDUCED_ROWS:
            continue  # numpy has no bfloat16, and the interpreter's dot multiplies its bits
        codes, scales = quantized(n, N, K, bits, group_size, device=DEVICE)
        x = torch.randn(n, M, K, device=DEVICE).to(dtype)
        check(product(x, codes, scales, bits, group_size), x, codes, scales, bits, group_size)


@on_a_device
@pytest.mark.parametrize("scales_dtype", [torch.float32, torch.float16])
def test_scales_of_any_dtype_and_operands_of_any_strides(scales_dtype):
    codes, scales = quantized(2, 6, 96, 4, 32, device=DEVICE)
    x = torch.randn(96, 5, 2, device=DEVICE).permute(2, 1, 0)
    scales = scales.to(scales_dtype)
    apart = torch.stack([codes, codes], -1)[..., 0], torch.stack([scales, scales], -1)[..., 0]
    check(product(x, *apart, 4, 32), x, codes, scales, 4, 32)


@on_a_device
def test_extreme_codes_are_exact():
    codes = torch.arange(-128, 128, device=DEVICE).to(torch.int8).view(1, 2, 128)
    x = torch.eye(128, device=DEVICE)
    y = [
        product(x[None, k : k + 1], codes, torch.ones(1, 2, 1, device=DEVICE), 8, 0)
        for k in (0, 127)
    ]
    assert [row.flatten().tolist() for row in y] == [[-128, 0], [-1, 127]]
    y = product(x[None, :16], codes, torch.ones(1, 2, 1, device=DEVICE), 8, 0)
    assert torch.equal(y[0].T, codes[0, :, :16].float())


@on_a_device
def test_the_operator_is_well_formed_and_compiles():
    codes, scales = quantized(2, 8, 64, 4, 32, device=DEVICE)
    arguments = (torch.randn(2, 3, 64, device=DEVICE), codes, scales, 4, 32)
    torch.library.opcheck(torch.ops.wavelet_lm.quantized_matmul.default, arguments)
    compiled = torch.compile(product, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), product(*arguments), rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("M", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("bits, group_size", [(8, 0), (4, 128)])
def test_of_the_size_of_a_model_compiled_and_captured_in_a_cuda_graph(M, bits, group_size):
    codes, scales = quantized(3, 2048, 2048, bits, group_size, device="cuda")
    x = torch.randn(3, M, 2048, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(quantized_matmul, fullgraph=True, dynamic=False)
    for function in (quantized_matmul, compiled):
        warm = function(x, codes, scales, bits, group_size)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = function(x, codes, scales, bits, group_size)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, warm)
        sample = slice(0, 2048, 97)  # of the rows: the definition is slow
        check(y[..., sample], x, codes[:, sample], scales[:, sample], bits, group_size)


@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="the tests above run in this process"
)
def test_in_the_interpreter():
    in_the_interpreter(__file__)
