"""Weights in few bits against the numbers they stand for, and layers of them against float ones."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from wavelet_lm.fusion.linear import BatchedLinear
from wavelet_lm.models.wavelet_lm.memory import SubKeys, ValueTable
from wavelet_lm.quantization import weights as weights_module
from wavelet_lm.quantization.weights import (
    QuantizedBatchedLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSubKeys,
    QuantizedValueTable,
    QuantizedWeight,
    quantize_weight,
    use_cpu_layout,
)
from wavelet_lm.roles import TABLE

RANDOM = {"max_examples": 60, "suppress_health_check": list(HealthCheck), "derandomize": True}
BITS = (8, 4, 2)
bits_of = pytest.mark.parametrize("bits", BITS)


def one_outlier(*shape):
    W = torch.randn(shape)
    W[..., shape[-1] // 2] *= 1e4
    return W


DISTRIBUTIONS = {
    "normal": torch.randn,
    "one outlier": one_outlier,
    "zero": torch.zeros,
    "constant": lambda *shape: torch.full(shape, -0.3),
    "tiny": lambda *shape: torch.randn(shape) * 1e-30,
    "huge": lambda *shape: torch.randn(shape).clamp(-3, 3) * 1e38,
    "rows of all sizes": lambda n, N, K: torch.randn(n, N, K) * torch.logspace(-9, 9, N)[:, None],
}
OUTERMOST = {8: 127, 4: 7.5, 2: 1.5}


def columns_scales(weight, bits, group_size):
    """The scale of every single weight, [n, N, K]."""
    size = weight.K if bits == 8 else group_size
    return weight.scales.double().repeat_interleave(size, -1)[..., : weight.K]


@settings(**RANDOM)
@given(
    st.sampled_from(BITS),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 150),
    st.sampled_from([16, 32, 64]),
    st.sampled_from(sorted(DISTRIBUTIONS)),
)
def test_every_weight_is_within_half_a_step(bits, n, N, K, group_size, distribution):
    torch.manual_seed(0)
    W = DISTRIBUTIONS[distribution](n, N, K)
    weight = quantize_weight(W, bits, group_size)
    assert weight.codes.shape == (n, N, -(-K * bits // 8))
    assert weight.codes.element_size() == 1
    assert weight.scales.dtype == torch.bfloat16
    assert weight.scales.shape == (n, N, 1 if bits == 8 else -(-K // group_size))
    scales = columns_scales(weight, bits, group_size)
    found = weight.dequantized(torch.float64)
    # Divided in float32: what is next to the middle of two levels may be at the further one.
    assert ((found - W.double()).abs() <= scales * (0.5 + 1e-5)).all()
    # A scale is the least bfloat16 that spans the weights: less than 1 % more than spans them.
    starts = range(0, K, K if bits == 8 else group_size)
    size = K if bits == 8 else group_size
    most = torch.stack([W.double()[..., i : i + size].abs().amax(-1) for i in starts], -1)
    spanned = weight.scales.double() * OUTERMOST[bits]
    assert (spanned >= most * (1 - 1e-6)).all()
    assert (spanned <= most * 1.01).all()
    assert torch.equal(weight.dequantized(), found.float())
    for i in range(n):
        rows = torch.randint(N, (2, 3))
        of_one = QuantizedWeight(
            weight.codes[i : i + 1], weight.scales[i : i + 1], K, bits, group_size
        )
        assert torch.equal(of_one.rows(rows, torch.float64), found[i][rows])
    meta = quantize_weight(W.to("meta"), bits, group_size)
    for name, p in weight.named_parameters():
        other = getattr(meta, name)
        assert (p.shape, p.dtype) == (other.shape, other.dtype)


def test_weights_on_levels_stay_where_they_are():
    """Quantizing what was quantized finds the same codes: no level is off by one."""
    for bits in BITS:
        weight = quantize_weight(torch.randn(2, 9, 70), bits, 16)
        again = quantize_weight(weight.dequantized(), bits, 16)
        steps = columns_scales(again, bits, 16)
        moved = (again.dequantized().double() - weight.dequantized().double()).abs()
        assert (moved <= steps / 2).all()
        kept = (again.scales == weight.scales).all(-1)
        assert kept.any()
        assert torch.equal(again.codes[kept], weight.codes[kept])


@bits_of
def test_layers_are_those_of_the_dequantized_weight(bits, monkeypatch):
    n, N, K, x = 3, 10, 37, torch.randn(2, 5, 37).double()
    weight = quantize_weight(torch.randn(n, N, K), bits, 16)
    one = quantize_weight(torch.randn(1, N, K), bits, 16)
    numbers, number = weight.dequantized(torch.float64), one.dequantized(torch.float64)[0]

    def check(found, expected):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    for bias in (None, torch.randn(n, N).double()):
        batch = QuantizedBatchedLinear(weight, bias)
        check(batch(x[:1].expand(n, -1, -1)), BatchedLinear(numbers, bias)(x[:1].expand(n, -1, -1)))
        for i in range(n):
            check(batch.one(i, x), BatchedLinear(numbers, bias).one(i, x))
        vector = None if bias is None else bias[0]
        check(QuantizedLinear(one, vector)(x), nn.functional.linear(x, number, vector))

    idx = torch.randint(N, (2, 4))
    check(QuantizedEmbedding(one, torch.float64)(idx), number[idx])

    keys = SubKeys(n, N, K).double()
    keys.weight.data = numbers
    q = torch.randn(2, 5, n, K).double()
    check(QuantizedSubKeys(weight)(q), keys(q))

    table = ValueTable(N, K, 3).double()
    table.weight.data = number
    rows, factors = torch.randint(N, (9, 3)), torch.randn(9, 3).double()
    quantized = QuantizedValueTable(one, torch.float64, TABLE)
    check(quantized(rows, factors), table(rows, factors))
    check(quantized(rows[:0], factors[:0]), table(rows[:0], factors[:0]))
    monkeypatch.setattr(weights_module, "CHUNK_ELEMENTS", 4 * 3 * K)  # four positions at once
    check(quantized(rows, factors), table(rows, factors))
    assert quantized.empty(2, 3).shape == table.empty(2, 3).shape
    assert quantized.empty(2, 3).dtype == torch.float64


def test_the_cpu_layout_is_the_same_product_and_leaves_tables_alone():
    def quantized(N, K, bits=4, group_size=32, n=1):
        return quantize_weight(torch.randn(n, N, K), bits, group_size)

    tied = quantized(32, 64)
    layers = [
        QuantizedLinear(quantized(32, 64), None),
        QuantizedBatchedLinear(quantized(16, 96, n=3), None),
        QuantizedSubKeys(quantized(16, 32, n=2)),
        QuantizedLinear(quantized(32, 64, bits=8), None),
        QuantizedLinear(quantized(32, 64, group_size=16), None),
        QuantizedLinear(quantized(33, 64), None),
        QuantizedLinear(quantized(32, 65), None),
        QuantizedLinear(tied, None),
        QuantizedEmbedding(tied, torch.float32),
        QuantizedValueTable(quantized(32, 64), torch.float32, TABLE),
    ]
    model = nn.ModuleList(layers)
    exact = copy.deepcopy(model).double()
    before = sum(p.numel() * p.element_size() for p in layers[0].weight.parameters())
    use_cpu_layout(model)
    assert [i for i, layer in enumerate(layers) if layer.weight.in_cpu_layout] == [0, 1, 2, 5]
    # A zero beside each scale is all that there is more.
    after = sum(p.numel() * p.element_size() for p in layers[0].weight.parameters())
    assert after == before + 2 * 32 * 64 // 32

    def check(found, expected):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 2**-6 * expected.abs().max()

    inputs = [torch.randn(shape) for shape in ((2, 7, 64), (3, 5, 96), (2, 3, 2, 32))]
    for i, x in enumerate(inputs):
        for dtype in (torch.float32, torch.bfloat16):
            assert layers[i](x.to(dtype)).dtype == dtype
            check(layers[i](x.to(dtype)), exact[i](x.double()))
    for j in range(3):
        check(layers[1].one(j, inputs[1][0]), exact[1].one(j, inputs[1][0].double()))
    idx = torch.arange(32)
    assert torch.equal(layers[8](idx), exact[8](idx).float())
