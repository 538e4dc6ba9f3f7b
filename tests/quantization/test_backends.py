"""Other libraries' layers against the weights that they were made from, element by element."""

import sys

import pytest
import torch
from torch import nn

from tests.conftest import perturb, tiny_config
from wavelet_lm import UserError, build_model
from wavelet_lm.fusion.fuse import COMPONENTS, fuse
from wavelet_lm.fusion.linear import BatchedLinear, FusedLinear, cast
from wavelet_lm.quantization.backends import LibraryWeight, backend_layer, check_backend
from wavelet_lm.quantization.quantize import quantize
from wavelet_lm.quantization.scheme import Scheme

KINDS = (("bitsandbytes", 8), ("bitsandbytes", 4), ("torchao", 8))
DTYPES = (torch.float32, torch.bfloat16)
# A bfloat16 scale or input, times a bfloat16 level, rounded to bfloat16.
ROUNDING = 2**-7
# Half of NF4's widest gap, −1 to −0.6962, and of that of the 8 bits of its scales.
NF4_HALF_GAP, SCALE_HALF_GAP = (1 - 0.6962) / 2, 1 / 128


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}{kind[1]}")
def kind(request):
    pytest.importorskip(request.param[0])
    return request.param


def scheme(backend="native", calibrated=False, **bits):
    values = dict.fromkeys(COMPONENTS, 8) | bits
    return Scheme(bits=values, group_size=64, backend=backend, calibrated=calibrated)


def half_steps(W, backend, bits):
    """How far a weight may be from its level."""
    if bits == 8:
        return W.abs().amax(1, keepdim=True).expand_as(W) / 127 / 2
    flat = W.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64).abs().amax(1)
    steps = NF4_HALF_GAP * blocks + SCALE_HALF_GAP * blocks.max()
    return steps.repeat_interleave(64)[: len(flat)].view_as(W)


def read_weights(layer, K, dtype):
    """What the products see, [N, K]: an input of a single 1 is exact in 8 bits too."""
    device = next(layer.parameters()).device
    return layer(torch.eye(K, dtype=dtype, device=device)).float().T


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_a_gpu_stay_there(kind, dtype):
    W = torch.randn(64, 128, device="cuda")
    layer = backend_layer(kind[0], FusedLinear.of(W, None), kind[1], dtype)
    assert all(p.is_cuda for p in layer.parameters())
    error = (read_weights(layer, 128, dtype) - W).abs()
    assert (error <= half_steps(W, *kind) * (1 + ROUNDING) + ROUNDING * W.abs()).all()


# The first two fit bitsandbytes' layout for CPUs, the others do not.
@pytest.mark.parametrize("shape", [(64, 128), (32, 64), (48, 40), (33, 65), (7, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_at_their_nearest_levels(kind, shape, dtype):
    N, K = shape
    W = torch.randn(N, K) * torch.linspace(0.01, 3, N)[:, None]
    layer = backend_layer(kind[0], FusedLinear.of(W, None), kind[1], dtype)
    error = (read_weights(layer, K, dtype) - W).abs()
    assert (error <= half_steps(W, *kind) * (1 + ROUNDING) + ROUNDING * W.abs()).all()


@pytest.mark.parametrize("shape", [(64, 128), (33, 65)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_weights(kind, shape, dtype):
    N, K = shape
    layer = backend_layer(kind[0], FusedLinear.of(torch.randn(N, K), None), kind[1], dtype)
    x = torch.randn(3, 5, K).to(dtype)
    read, found = read_weights(layer, K, dtype), layer(x)
    bound = ROUNDING * (x.float().abs() @ read.T.abs())
    if kind == ("bitsandbytes", 8):  # its inputs have 8 bits as well
        bound += x.float().abs().amax(-1, keepdim=True) / 127 / 2 * read.abs().sum(1)
    assert found.dtype == dtype
    assert ((found.float() - x.float() @ read.T).abs() <= bound + 1e-5).all()


@pytest.mark.parametrize("made_for", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_its_matrices(kind, made_for, dtype):
    n, N, K = 3, 32, 64
    W, bias, x = torch.randn(n, N, K), torch.randn(n, N), torch.randn(n, 4, K).to(dtype)
    before = W.clone()
    batch = cast(backend_layer(kind[0], BatchedLinear(W, bias), kind[1], made_for), dtype)
    whole = batch(x)
    assert whole.shape == (n, 4, N)
    assert whole.dtype == dtype
    for i in range(n):
        alone = backend_layer(kind[0], FusedLinear.of(W[i], bias[i]), kind[1], made_for)
        plain = backend_layer(kind[0], FusedLinear.of(W[i], None), kind[1], made_for)
        expected = plain(x[i]) + bias[i].to(dtype)
        for found in (whole[i], batch.one(i, x[i]), cast(alone, dtype)(x[i])):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert batch.one(i, x[i, 0]).shape == (N,)
        assert batch.one(i, x[i].view(2, 2, K)).shape == (2, 2, N)
    assert torch.equal(W, before)


def test_parameters_are_the_memory_and_survive_a_cast(kind):
    N, K = 64, 128
    layer = backend_layer(kind[0], FusedLinear.of(torch.randn(N, K), None), kind[1], DTYPES[0])
    x = torch.randn(2, K)
    expected = layer(x)
    quantized_model = cast(nn.Sequential(layer), torch.bfloat16).eval()
    assert torch.equal(quantized_model[0](x), expected)
    for model in (layer, quantized_model):
        stored = sum(p.numel() * p.element_size() for p in model.parameters())
        if kind[1] == 8:
            assert stored == N * K + 4 * N
        else:
            assert N * K / 2 < stored <= N * K / 2 + 2 * N * K / 64 + 8
    (inside,) = layer.weight.layers  # has not moved elsewhere in its first products
    codes = inside.weight.qdata if kind[0] == "torchao" else inside.weight
    assert codes.data_ptr() in {p.data_ptr() for p in quantized_model.parameters()}


def test_every_matrix_of_a_model_is_the_librarys(kind):
    model = perturb(build_model(tiny_config(C=32), 50)).eval()
    quantized_model = quantize(model, scheme(kind[0], **dict.fromkeys(COMPONENTS, kind[1])))
    matrices = [m for m in fuse(model).modules() if type(m) in (FusedLinear, BatchedLinear)]
    layers = [
        layer
        for m in quantized_model.modules()
        if isinstance(m, LibraryWeight)
        for layer in m.layers
    ]
    assert len(layers) == sum(len(m.weight) if m.weight.ndim == 3 else 1 for m in matrices)
    assert not any(type(m) in (FusedLinear, BatchedLinear) for m in quantized_model.modules())
    idx = torch.randint(50, (2, 16))
    exact, found = model(idx)[0], quantized_model(idx)[0]
    # Other weights of the same size would make this √2.
    ratio = (found - exact).norm() / (exact - exact.mean(-1, keepdim=True)).norm()
    assert 0 < ratio < (0.1 if kind[1] == 8 else 1)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (scheme("torchao", mlp=4), r"torchao has no weights of 4 bits \(mlp\); choose among 8, 16"),
        (scheme("bitsandbytes", lifting=2), r"2 bits \(lifting\); choose among 4, 8, 16"),
        (scheme("torchao", calibrated=True), "torchao rounds without a calibration text"),
        (scheme("bitsandbytes", calibrated=True), "leave --ptq_calibrate out"),
    ],
)
def test_what_a_library_does_not_offer_is_refused(wanted, message):
    with pytest.raises(UserError, match=message):
        check_backend(wanted)


def test_a_missing_library_is_named(kind, monkeypatch):
    backend = kind[0]
    check_backend(scheme(backend, embedding=2, mlp=16))
    for name in [n for n in sys.modules if n == backend or n.startswith(f"{backend}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"needs {backend}; install it with pip install"):
        check_backend(scheme(backend))
    check_backend(scheme(calibrated=True, mlp=2))
