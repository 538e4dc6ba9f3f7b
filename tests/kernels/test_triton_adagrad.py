"""Adagrad's kernel beside its plain twin, on a GPU or, elsewhere, in Triton's interpreter.

Without a GPU the comparisons run in a process of their own (`test_in_the_interpreter`), and the
kernel is compiled for the GPUs that it is meant for, which needs none.
"""

import os
import re

import pytest
import torch

from tests.kernels.interpreter import in_the_interpreter
from wavelet_lm.kernels.adagrad import Rates, adagrad_, decay_

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_a_device = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA GPU or the interpreter"
)
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
# One number, less than a chunk, chunks with a rest, whole ones.
SHAPES = [(), (3,), (4096,), (2, 4096), (70, 70), (1, 4097)]


def operands(seed=0, shapes=SHAPES, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)

    def some(scale):
        return [(scale * torch.randn(s, generator=generator)).to(device) for s in shapes]

    return some(1.0), some(0.1), [s.square() for s in some(0.1)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@on_a_device
@pytest.mark.parametrize("decoupled, decay", [(False, 0.1), (True, 0.1), (False, 0.0)])
@pytest.mark.parametrize("divisor, skip", [(None, None), (3.0, None), (3.0, 0.0), (3.0, 1.0)])
def test_equals_the_twin(decoupled, decay, divisor, skip):
    from wavelet_lm.kernels.triton_adagrad import Launcher

    rates = Rates(0.01, decay, decoupled, 1e-8)
    scalars = [None if x is None else torch.tensor(x, device=DEVICE) for x in (divisor, skip)]
    weights, gradients, sums = operands()
    twins, sums_of_twins = ([t.clone() for t in ts] for ts in (weights, sums))
    if skip:
        gradients[2].fill_(float("nan"))
    launch = Launcher()
    for _ in range(2):
        launch(weights, gradients, sums, rates, *scalars)
        adagrad_(twins, gradients, sums_of_twins, rates, *scalars)
    assert_same(weights + sums, twins + sums_of_twins)
    assert skip or not torch.equal(weights[1], operands()[0][1])


@on_a_device
def test_tensors_may_lie_anywhere_and_move():
    from wavelet_lm.kernels.triton_adagrad import Launcher

    rates, launch = Rates(0.01, 0.1, False, 1e-8), Launcher()
    for seed in range(3):
        # Other places, other numbers of weights, addresses that no 16 bytes divide.
        shapes = [(5000 + seed,), (7, 9)][: 2 - seed % 2]
        weights, gradients, sums = operands(seed, shapes)
        if seed == 2:
            weights, sums = ([t.flatten()[1:] for t in ts] for ts in (weights, sums))
            gradients = [t.flatten()[1:] for t in gradients]
        else:
            gradients = [g if g.ndim < 2 else g.T.contiguous().T for g in gradients]
        twins, sums_of_twins = ([t.clone() for t in ts] for ts in (weights, sums))
        launch(weights, gradients, sums, rates)
        adagrad_(twins, gradients, sums_of_twins, rates)
        assert_same(weights + sums, twins + sums_of_twins)


@on_a_device
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skip", [None, 1.0])
def test_gradients_and_copies_in_half_precision(half, skip):
    """Some of the weights have them, in one call; the copies are the weights, rounded."""
    from wavelet_lm.kernels.triton_adagrad import Launcher

    rates, scalars = Rates(0.01, 0.1, False, 1e-8), [torch.tensor(3.0, device=DEVICE), None]
    scalars[1] = None if skip is None else torch.tensor(skip, device=DEVICE)
    weights, gradients, sums = operands()
    twins, sums_of_twins = ([t.clone() for t in ts] for ts in (weights, sums))
    launch = Launcher()
    gradients = [g.to(half) if i % 2 else g for i, g in enumerate(gradients)]
    copies = [w.to(half) if i % 3 else None for i, w in enumerate(weights)]
    before = [None if c is None else c.clone() for c in copies]
    for _ in range(2):
        launch(weights, gradients, sums, rates, *scalars, copies)
        adagrad_(twins, gradients, sums_of_twins, rates, *scalars)
    assert_same(weights + sums, twins + sums_of_twins)
    for w, copy, old in zip(weights, copies, before, strict=True):
        if copy is not None:
            # Triton's interpreter cuts a bfloat16 off where a GPU rounds it.
            within = 2.0**-7 if INTERPRETED and half == torch.bfloat16 else 0
            torch.testing.assert_close(copy, w.to(half), rtol=within, atol=0)
            assert torch.equal(copy, old) == bool(skip)


@on_a_device
def test_weights_and_sums_are_float32():
    from wavelet_lm.kernels.triton_adagrad import Launcher

    weights, gradients, sums = operands()
    rates = Rates(0.01, 0.0, False, 1e-8)
    for wrong in ([s.bfloat16() for s in sums], [s.double() for s in sums]):
        with pytest.raises(TypeError, match=f"not for {wrong[0].dtype}"):
            Launcher()(weights, gradients, wrong, rates)
    with pytest.raises(TypeError, match=r"not for torch\.float64"):
        Launcher()(weights, [g.double() for g in gradients], sums, rates)


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_twin_is_pytorchs_adagrad(decoupled):
    weights, gradients, sums = operands(device="cpu")
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = torch.optim.Adagrad(
        theirs, lr=0.01, weight_decay=0.0 if decoupled else 0.1, eps=1e-8
    )
    for p, g, s in zip(theirs, gradients, sums, strict=True):
        p.grad = g / 4
        optimizer.state[p]["sum"].copy_(s)
    for _ in range(3):
        adagrad_(weights, gradients, sums, Rates(0.01, 0.1, decoupled, 1e-8), torch.tensor(4.0))
        if decoupled:
            decay_([p.data for p in theirs], 0.01 * 0.1)
        optimizer.step()
    assert_same(weights, [p.detach() for p in theirs])
    assert_same(sums, [optimizer.state[p]["sum"] for p in theirs])


@compiles
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_compiles_for_every_gpu_and_moves_16_bytes_at_once(capability, half):
    """Of a whole chunk each of 256 threads reads 3 × 16 numbers and writes 2 × 16, in fours.

    Of gradients in half precision it reads eight at once, and so it writes the copies.
    """
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wavelet_lm.kernels.multi_tensor import ALIGNMENT, CHUNK, WARPS
    from wavelet_lm.kernels.triton_adagrad import _kernel

    constants = {"skip_ptr": None, "DECOUPLED": False, "ALIGNED": ALIGNMENT, "SIZE": CHUNK}
    constants["GRADIENT"] = tl.bfloat16 if half else tl.float32
    constants["COPY"] = tl.bfloat16 if half else None
    types = {"chunks_ptr": "*i32", "divisor_ptr": "*fp32"}
    types |= dict.fromkeys(("lr", "decay", "eps"), "fp32") | dict.fromkeys(constants, "constexpr")
    names = _kernel.arg_names
    source = ASTSource(
        _kernel,
        {name: types.get(name, "*i64") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": WARPS})
    ptx = compiled.asm["ptx"]
    fours = CHUNK // (32 * WARPS) // 4
    assert ("cvt.rn.bf16" in ptx) == half  # to the nearest, as PyTorch casts
    eights = fours // 2 if half else 0
    assert len(re.findall(r"ld\.global\.v4", ptx)) == (2 * fours + eights if half else 3 * fours)
    assert len(re.findall(r"st\.global\.v4", ptx)) == 2 * fours + eights


@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="the tests above run in this process"
)
def test_in_the_interpreter():
    said = in_the_interpreter(__file__)
    assert re.search(r"2\d passed", said), said[-400:]
