"""AdamW's kernel beside its plain twin, on a GPU or, elsewhere, in Triton's interpreter.

Without a GPU the comparisons run in a process of their own (`test_in_the_interpreter`), and the
kernel is compiled for the GPUs that it is meant for, which needs none.
"""

import re

import pytest
import torch

from tests.kernels.interpreter import in_the_interpreter
from tests.kernels.test_triton_adagrad import (
    DEVICE,
    INTERPRETED,
    SHAPES,
    assert_same,
    compiles,
    on_a_device,
)
from wavelet_lm.kernels.adamw import Rates, adamw_

triton = pytest.importorskip("triton")

RATES = Rates(0.01, 0.1, (0.9, 0.99), 1e-8)


class Operands:
    """Weights that are some steps old, one of which began later than the others."""

    def __init__(self, seed=0, shapes=SHAPES, device=DEVICE):
        generator = torch.Generator().manual_seed(seed)

        def some(scale):
            return [(scale * torch.randn(s, generator=generator)).to(device) for s in shapes]

        self.weights, self.gradients, self.firsts = some(1.0), some(0.1), some(0.1)
        self.seconds = [s.square() for s in some(0.1)]
        ages = [7.0] * (len(shapes) - 1) + [1.0]
        self.steps = [torch.tensor(age, device=device) for age in ages]

    def state(self):
        return self.weights + self.firsts + self.seconds

    def moments(self):
        return self.firsts, self.seconds, self.steps


@on_a_device
@pytest.mark.parametrize("decay", [0.1, 0.0])
@pytest.mark.parametrize("divisor, skip", [(None, None), (3.0, None), (3.0, 0.0), (3.0, 1.0)])
def test_equals_the_twin(decay, divisor, skip):
    from wavelet_lm.kernels.triton_adamw import Launcher

    rates = RATES._replace(weight_decay=decay)
    scalars = [None if x is None else torch.tensor(x, device=DEVICE) for x in (divisor, skip)]
    ours, twin, launch = Operands(), Operands(), Launcher()
    if skip:
        ours.gradients[2].fill_(float("nan"))
    for _ in range(2):
        launch(ours.weights, ours.gradients, *ours.moments(), rates, *scalars)
        adamw_(twin.weights, ours.gradients, *twin.moments(), rates, *scalars)
    assert_same(ours.state(), twin.state())
    assert bool(skip) == torch.equal(ours.weights[1], Operands().weights[1])


@on_a_device
def test_tensors_may_lie_anywhere_and_move():
    from wavelet_lm.kernels.triton_adamw import Launcher

    launch = Launcher()
    for seed in range(3):
        # Other places, other numbers of weights, addresses that no 16 bytes divide.
        shapes = [(5000 + seed,), (7, 9)][: 2 - seed % 2]
        ours, twin = Operands(seed, shapes), Operands(seed, shapes)
        if seed == 2:
            for each in (ours, twin):
                lists = (each.weights, each.gradients, each.firsts, each.seconds)
                each.weights, each.gradients, each.firsts, each.seconds = (
                    [t.flatten()[1:] for t in ts] for ts in lists
                )
        else:
            ours.gradients = [g if g.ndim < 2 else g.T.contiguous().T for g in ours.gradients]
        launch(ours.weights, ours.gradients, *ours.moments(), RATES)
        adamw_(twin.weights, twin.gradients, *twin.moments(), RATES)
        assert_same(ours.state(), twin.state())


@on_a_device
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skip", [None, 1.0])
def test_gradients_and_copies_in_half_precision(half, skip):
    """Some of the weights have them, in one call; the copies are the weights, rounded."""
    from wavelet_lm.kernels.triton_adamw import Launcher

    scalars = [torch.tensor(3.0, device=DEVICE), None]
    scalars[1] = None if skip is None else torch.tensor(skip, device=DEVICE)
    ours, twin, launch = Operands(), Operands(), Launcher()
    gradients = [g.to(half) if i % 2 else g for i, g in enumerate(ours.gradients)]
    copies = [w.to(half) if i % 3 else None for i, w in enumerate(ours.weights)]
    before = [None if c is None else c.clone() for c in copies]
    for _ in range(2):
        launch(ours.weights, gradients, *ours.moments(), RATES, *scalars, copies)
        adamw_(twin.weights, gradients, *twin.moments(), RATES, *scalars)
    assert_same(ours.state(), twin.state())
    for w, copy, old in zip(ours.weights, copies, before, strict=True):
        if copy is not None:
            # Triton's interpreter cuts a bfloat16 off where a GPU rounds it.
            within = 2.0**-7 if INTERPRETED and half == torch.bfloat16 else 0
            torch.testing.assert_close(copy, w.to(half), rtol=within, atol=0)
            assert torch.equal(copy, old) == bool(skip)


@on_a_device
def test_weights_and_moments_are_float32():
    from wavelet_lm.kernels.triton_adamw import Launcher

    ours = Operands()
    with pytest.raises(TypeError, match=r"not for torch\.bfloat16"):
        wrong = [m.bfloat16() for m in ours.firsts]
        Launcher()(ours.weights, ours.gradients, wrong, ours.seconds, ours.steps, RATES)


@pytest.mark.parametrize("fused", [False, True])
def test_the_twin_is_pytorchs_adamw(fused):
    ours = Operands(device="cpu")
    theirs = [torch.nn.Parameter(w.clone()) for w in ours.weights]
    keys = {"lr": RATES.lr, "weight_decay": RATES.weight_decay, "betas": RATES.betas, "eps": 1e-8}
    optimizer = torch.optim.AdamW(theirs, **keys, fused=fused)
    for t in ours.firsts + ours.seconds + ours.steps:
        t.zero_()
    for step in range(1, 30):
        gradients = [g * step for g in ours.gradients]
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g / 4
        torch._foreach_add_(ours.steps, 1)
        adamw_(ours.weights, gradients, *ours.moments(), RATES, torch.tensor(4.0))
        optimizer.step()
    assert_same(ours.weights, [p.detach() for p in theirs])
    assert_same(ours.firsts, [optimizer.state[p]["exp_avg"] for p in theirs])
    assert_same(ours.seconds, [optimizer.state[p]["exp_avg_sq"] for p in theirs])


@compiles
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_compiles_for_every_gpu_and_moves_16_bytes_at_once(capability, half):
    """Of a whole chunk each of 256 threads reads 4 × 16 numbers and writes 3 × 16, in fours.

    Of gradients in half precision it reads eight at once, and so it writes the copies.
    """
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wavelet_lm.kernels.multi_tensor import ALIGNMENT, CHUNK, WARPS
    from wavelet_lm.kernels.triton_adamw import _kernel

    constants = {"skip_ptr": None, "ALIGNED": ALIGNMENT, "SIZE": CHUNK}
    constants["GRADIENT"] = tl.bfloat16 if half else tl.float32
    constants["COPY"] = tl.bfloat16 if half else None
    types = {"chunks_ptr": "*i32", "divisor_ptr": "*fp32", "corrections_ptr": "*fp32"}
    numbers = ("lr", "kept", "less_beta1", "beta2", "less_beta2", "eps")
    types |= dict.fromkeys(numbers, "fp32") | dict.fromkeys(constants, "constexpr")
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
    assert len(re.findall(r"ld\.global\.v4", ptx)) == (3 * fours + eights if half else 4 * fours)
    assert len(re.findall(r"st\.global\.v4", ptx)) == 3 * fours + eights


@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="the tests above run in this process"
)
def test_in_the_interpreter():
    said = in_the_interpreter(__file__)
    assert re.search(r"1\d passed", said), said[-400:]
