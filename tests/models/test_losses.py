import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy

from wavelet_lm.kernels import linear_cross_entropy as blocks
from wavelet_lm.models import losses


@pytest.fixture(params=[1, 40, 10**6])
def chunk_elements(request, monkeypatch):
    """One position at a time, a few, all at once."""
    monkeypatch.setattr(blocks, "LEAST_ROWS", 1)
    monkeypatch.setattr(blocks, "BLOCK_LOGITS", request.param)
    for name in ("CHUNK_ELEMENTS", "GRADIENT_CHUNK_ELEMENTS"):
        monkeypatch.setattr(losses, name, {"cpu": request.param})


@pytest.fixture(params=["in blocks", "as on a GPU"])
def form(request, monkeypatch):
    """How gradients are taken."""
    if request.param == "as on a GPU":
        as_on_a_gpu(monkeypatch)


def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(losses, "IN_BLOCKS", set())


def data(N=13, C=5, V=7, dtype=torch.float64):
    return (
        torch.randn(N, C, dtype=dtype, requires_grad=True),
        torch.randn(V, C, dtype=dtype, requires_grad=True),
        torch.randint(V, (N,)),
    )


def test_value_and_gradients_equal_torch(chunk_elements, form):
    hidden, weight, targets = data()
    value = losses.mean_cross_entropy(hidden, weight, targets)
    got = torch.autograd.grad(3 * value, (hidden, weight))
    plain = cross_entropy(hidden @ weight.T, targets)
    torch.testing.assert_close(value, plain)
    for a, b in zip(got, torch.autograd.grad(3 * plain, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_padded_vocabulary_changes_nothing(chunk_elements, monkeypatch):
    """What a GPU does for its tiles; the rows that are added get no probability."""
    as_on_a_gpu(monkeypatch)
    hidden, weight, targets = data()
    plain = losses.mean_cross_entropy(hidden, weight, targets)
    expected = plain, *torch.autograd.grad(plain, (hidden, weight))
    monkeypatch.setattr(losses, "VOCAB_MULTIPLE", {"cpu": 64})
    value = losses.mean_cross_entropy(hidden, weight, targets)
    got = value, *torch.autograd.grad(value, (hidden, weight))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_targets_are_taken_off_the_same_compiled_or_not(monkeypatch):
    p, targets = torch.rand(5, 7), torch.randint(7, (5,))
    expected = p - torch.nn.functional.one_hot(targets, 7)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda answer=compiling: answer)
        torch.testing.assert_close(losses._less_one_hot(p.clone(), targets), expected)


def test_chunks_are_of_equal_lengths():
    hidden = torch.zeros(2048, 1)
    chunks = losses._chunks(hidden, 50257, hidden[:, 0], {"cpu": 2**25})
    assert [len(h) for h, _ in chunks] == [512] * 4


def test_gradcheck(chunk_elements, form):
    hidden, weight, targets = data(N=4)
    assert gradcheck(lambda h, w: losses.mean_cross_entropy(h, w, targets), (hidden, weight))


def test_the_heads_gradient_of_chunks_in_half_precision(monkeypatch):
    """Products in bfloat16 are added up in float32, whatever the head itself is in."""
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(losses, "GRADIENT_CHUNK_ELEMENTS", {"cpu": 700})
    hidden, weight, targets = data(N=300, C=16, V=50, dtype=torch.float32)
    plain = cross_entropy(hidden @ weight.T, targets)
    _, expected = torch.autograd.grad(3 * plain, (hidden, weight))
    for head in (weight, weight.detach().bfloat16().requires_grad_()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses.mean_cross_entropy(hidden, head, targets)
        (got,) = torch.autograd.grad(3 * loss, head)
        assert got.dtype == head.dtype
        assert (got - expected).norm() < 1e-2 * expected.norm()


def test_per_token_values(chunk_elements):
    hidden, weight, targets = data()
    expected = cross_entropy(hidden @ weight.T, targets, reduction="none")
    got = losses.token_cross_entropy(hidden, lambda h: h @ weight.T, len(weight), targets)
    torch.testing.assert_close(got, expected)


def test_small_gradients_survive_half_precision(form):
    """With 4,096 positions a gradient over N would underflow float16 before it is scaled."""
    hidden, weight, targets = data(N=4096, C=16, V=300, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        losses.mean_cross_entropy(hidden, weight, targets).backward()
    grads = hidden.grad, weight.grad
    plain = cross_entropy(hidden @ weight.T, targets)
    for got, expected in zip(grads, torch.autograd.grad(plain, (hidden, weight)), strict=True):
        assert (got - expected).norm() < 2e-3 * expected.norm()


def test_logits_never_stand_in_memory_at_once(monkeypatch, form):
    monkeypatch.setattr(blocks, "LEAST_ROWS", 1)
    monkeypatch.setattr(blocks, "BLOCK_LOGITS", 1000)
    monkeypatch.setattr(losses, "GRADIENT_CHUNK_ELEMENTS", {"cpu": 1000})
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // 4)
            return result

    hidden, weight, targets = data(N=500, C=4, V=100, dtype=torch.float32)
    with Watch():
        losses.mean_cross_entropy(hidden, weight, targets).backward()
    assert largest <= 500 * 4
