"""The format of quantized weights, and every product on a CPU beside its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavelet_lm.kernels.quantized_matmul import (
    dequantize,
    fits_cpu_layout,
    pack,
    quantized_matmul,
    quantized_matmul_cpu4,
    reference_quantized_matmul,
    to_cpu_layout,
    unpack,
)

FORMATS = [(8, 0), (4, 32), (4, 48), (2, 16), (2, 128)]
# Of |x| |w|: scaled weights, products and scaled products are rounded to bfloat16.
CPU_TOLERANCE = 3 * 2**-8


def quantized(n, N, K, bits, group_size, device="cpu"):
    """Random codes and scales (bfloat16), one scale in each group far from the others'."""
    if bits == 8:
        codes, n_groups = torch.randint(-127, 128, (n, N, K), dtype=torch.int8), 1
    else:
        u = torch.randint(2**bits, (n, N, K), dtype=torch.uint8)
        codes, n_groups = pack(u, bits), -(-K // group_size)
    scales = torch.rand(n, N, n_groups) + 0.1
    return codes.to(device), scales.bfloat16().to(device)


def largest_error(y, x, codes, scales, bits, group_size):
    """Of all elements of y, relative to the lengths of the row of x and the row of W."""
    x = x.double()  # or the reference itself would round to a short dtype
    expected = reference_quantized_matmul(x, codes, scales, bits, group_size)
    W = dequantize(codes, scales, x.shape[2], bits, group_size, torch.float64)
    lengths = x.norm(dim=-1)[:, :, None] * W.norm(dim=-1)[:, None, :] + 1e-30
    return ((y.double() - expected).abs() / lengths).max()


@given(st.data(), st.sampled_from([4, 2]), st.integers(1, 40))
def test_packing_loses_nothing_and_wastes_less_than_a_byte(data, bits, K):
    levels = st.integers(0, 2**bits - 1)
    u = data.draw(st.lists(st.lists(levels, min_size=K, max_size=K), min_size=1, max_size=3))
    u = torch.tensor(u, dtype=torch.uint8)
    codes = pack(u, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (len(u), -(-K * bits // 8))
    assert torch.equal(unpack(codes, K, bits), u)


def test_the_layout_is_the_one_that_files_have():
    """Written out by hand, so that a change of the format shows."""
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([3, 2, 1, 0, 1], dtype=torch.uint8), 2).tolist() == [0b00011011, 1]
    codes, scales = torch.tensor([[[0x80, 0x0F]]], dtype=torch.uint8), torch.tensor([[[2.0]]])
    weights = dequantize(codes, scales, 3, 4, 16, torch.float32)
    assert weights.tolist() == [[[-15.0, 1.0, 15.0]]]
    codes = torch.tensor([[[0b11100100]]], dtype=torch.uint8)
    assert dequantize(codes, scales, 4, 2, 16, torch.float32).tolist() == [[[-3.0, -1.0, 1.0, 3.0]]]
    codes = torch.tensor([[[-127, 5]]], dtype=torch.int8)
    assert dequantize(codes, scales, 2, 8, 0, torch.bfloat16).tolist() == [[[-254.0, 10.0]]]


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dequantized_weights_are_the_definition_rounded_once(bits, group_size, dtype):
    codes, scales = quantized(2, 5, 77, bits, group_size)
    W = dequantize(codes, scales, 77, bits, group_size, dtype)
    identity = torch.eye(77, dtype=torch.float64).expand(2, 77, 77)
    expected = reference_quantized_matmul(identity, codes, scales, bits, group_size).mT
    assert torch.equal(W, expected.to(dtype))


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("K", [1, 31, 64, 144, 300])
def test_products_on_a_cpu(bits, group_size, K):
    for n, M, N in ((1, 1, 1), (1, 1, 50), (3, 2, 17), (2, 16, 7), (2, 17, 16)):
        weights = (*quantized(n, N, K, bits, group_size), bits, group_size)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(n, M, K).to(dtype)
            y = quantized_matmul(x, *weights)
            assert y.dtype == dtype and y.shape == (n, M, N)
            assert largest_error(y, x.bfloat16(), *weights) < CPU_TOLERANCE
        x = torch.randn(n, M, K, dtype=torch.float64)
        assert largest_error(quantized_matmul(x, *weights), x, *weights) < 1e-14


def test_scales_in_float32_are_not_rounded():
    codes, scales = quantized(1, 16, 64, 8, 0)
    scales = scales.float() * (1 + 2**-9)  # a step and a half of int8 at its largest
    for M in (1, 20):
        x = torch.zeros(1, M, 64)
        x[..., 3] = 1
        y = quantized_matmul(x, codes, scales, 8, 0)
        expected = reference_quantized_matmul(x, codes, scales, 8, 0)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("K", [31, 64, 144])
def test_rows_of_a_step_are_what_they_are_alone(bits, group_size, K):
    weights = (*quantized(2, 48, K, bits, group_size), bits, group_size)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 64, K).to(dtype)
        alone = torch.cat([quantized_matmul(x[:, i : i + 1], *weights) for i in range(64)], 1)
        for M in (2, 16, 17, 33, 64):
            assert torch.equal(quantized_matmul(x[:, :M], *weights, step=True), alone[:, :M])


def test_many_rows_are_as_exact_as_one():
    """The scales multiply a product that was rounded once, and nothing rounds it again."""
    weights = (*quantized(1, 64, 256, 8, 0), 8, 0)
    x = torch.randn(1, 200, 256).bfloat16().float()
    exact = reference_quantized_matmul(x.double(), *weights)
    few = torch.cat([quantized_matmul(part, *weights) for part in x.split(8, 1)], 1)
    errors = [float((y - exact).norm()) for y in (few, quantized_matmul(x, *weights))]
    assert errors[1] <= 1.1 * errors[0]


def test_operands_may_be_parts_of_others():
    codes, scales = (t[::2, ::2] for t in quantized(4, 32, 64, 8, 0))
    x = torch.randn(4, 64, 3).mT[::2]
    y = quantized_matmul(x, codes, scales, 8, 0)
    assert largest_error(y, x.bfloat16(), codes, scales, 8, 0) < CPU_TOLERANCE


@pytest.mark.parametrize(("M", "bits", "group_size"), [(1, 8, 0), (20, 8, 0), (1, 4, 32)])
def test_is_one_graph_for_the_compiler(M, bits, group_size):
    codes, scales = quantized(2, 16, 64, bits, group_size)
    compiled = torch.compile(quantized_matmul, fullgraph=True, dynamic=False)
    x = torch.randn(2, M, 64)
    y = compiled(x, codes, scales, bits, group_size)
    assert largest_error(y, x, codes, scales, bits, group_size) < CPU_TOLERANCE


@pytest.mark.parametrize(("N", "K", "group_size"), [(16, 32, 32), (48, 256, 64), (64, 256, 128)])
def test_torchs_layout_of_four_bits(N, K, group_size):
    codes, scales = quantized(1, N, K, 4, group_size)
    assert fits_cpu_layout(N, K, group_size)
    packed = to_cpu_layout(codes[0], scales[0], K, group_size)
    assert packed[0].numel() * packed[0].element_size() == codes.numel()
    compiled = torch.compile(quantized_matmul_cpu4, fullgraph=True, dynamic=False)
    for M in (1, 5, 40):
        x = torch.randn(M, K)
        y = quantized_matmul_cpu4(x, *packed, group_size)
        assert y.dtype == torch.float32
        x = x.bfloat16()
        assert largest_error(y[None], x[None], codes, scales, 4, group_size) < CPU_TOLERANCE
    torch.testing.assert_close(compiled(x, *packed, group_size), y.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(("N", "K", "group_size"), [(15, 32, 32), (16, 48, 32), (16, 48, 48)])
def test_refuses_what_torchs_layout_cannot_hold(N, K, group_size):
    codes, scales = quantized(1, N, K, 4, group_size)
    assert not fits_cpu_layout(N, K, group_size)
    with pytest.raises(ValueError, match="no CPU layout for 4 bits"):
        to_cpu_layout(codes[0], scales[0], K, group_size)


@pytest.mark.parametrize(
    ("bits", "group_size", "K", "message"),
    [
        (3, 32, 64, "bits are 3"),
        (4, 24, 64, "group_size is 24"),
        (4, 0, 64, "group_size is 0"),
        (4, 32, 65, "do not fit x"),
        (8, 0, 64, "do not fit x"),
    ],
)
def test_refuses_what_is_no_weight(bits, group_size, K, message):
    codes, scales = quantized(1, 16, 64, 4, 32)
    with pytest.raises(ValueError, match=message):
        quantized_matmul(torch.randn(1, 1, K), codes, scales, bits, group_size)
