"""A step of a lifting wavelet as one kernel beside its plain twin.

Without a GPU the comparisons run in Triton's interpreter, in a process of its own
(`test_in_the_interpreter`), and the kernel is compiled for the GPUs that it is meant for.
"""

import os
import re
import signal

import pytest
import torch
from torch import nn

from tests.kernels.interpreter import in_the_interpreter
from wavelet_lm.kernels.lifting import lifting_step
from wavelet_lm.transforms.lifting import LiftingWavelet

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_a_device = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA GPU or the interpreter"
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="for the interpreter alone")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def operands(levels, C, H=None, dtype=torch.float32, device=DEVICE):
    """x, pasts, weights and biases of nets of one layer, or of two with H channels inside."""
    generator = torch.Generator().manual_seed(levels + C)

    def some(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    shapes = [(C, C)] * 2 if H is None else [(H, C), (C, H)] * 2
    weights = [some(*shape) / shape[1] ** 0.5 for shape in shapes * levels]
    return some(C), some(levels, C), weights, [some(len(w)) for w in weights]


def launched(inputs, arrivals):
    """What the kernel gives; the interpreter runs a program to its end, so that there is one."""
    from wavelet_lm.kernels import triton_lifting

    if not INTERPRETED:
        return triton_lifting.launch(*inputs, arrivals)
    with pytest.MonkeyPatch.context() as patch:
        tiles = triton_lifting.plan(len(inputs[0]), len(inputs[2][0]), 1)[1]
        patch.setattr(triton_lifting, "_multiprocessors", lambda device: 1)
        patch.setattr(triton_lifting, "plan", lambda *sizes: (1, tiles))
        return triton_lifting.launch(*inputs, arrivals)


def no_arrivals():
    return torch.zeros(1, dtype=torch.int32, device=DEVICE)


def check(results, inputs):
    expected = lifting_step(*(as_double(part) for part in inputs))
    for ours, theirs in zip(results, expected, strict=True):
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert ours.shape == theirs.shape
        assert error < TOLERANCE[ours.dtype]


def as_double(part):
    return part.double() if isinstance(part, torch.Tensor) else [x.double() for x in part]


@on_a_device
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "levels, C, H", [(1, 8, None), (3, 40, None), (2, 24, 24), (3, 33, 70), (2, 64, 20)]
)
def test_equals_the_twin(levels, C, H, dtype):
    inputs, arrivals = operands(levels, C, H, dtype), no_arrivals()
    check(launched(inputs, arrivals), inputs)
    assert arrivals.item() == 0


@on_a_device
def test_a_program_takes_as_many_tiles_as_there_are(monkeypatch):
    monkeypatch.setattr("wavelet_lm.kernels.triton_lifting.TILE", 128)
    for C, H in ((50, None), (40, 90)):
        arrivals = no_arrivals()
        for inputs in (operands(2, C, H), operands(2, C, H)):  # of other addresses
            check(launched(inputs, arrivals), inputs)


@pytest.mark.parametrize("linear", [True, False])
def test_the_twin_is_the_wavelet(linear):
    """The last position of a text, after what its delays have kept."""
    torch.manual_seed(1)
    wavelet = LiftingWavelet(3, 6, "random", crawl=3, linear=linear, hidden_mult=2).double()
    for p in wavelet.parameters():
        nn.init.normal_(p, 0, 0.5)
    x = torch.randn(1, 20, 6, dtype=torch.float64)
    expected, _ = wavelet.decompose(x)
    _, histories = wavelet.decompose(x[:, :-1])
    pasts, signal = [], x[:, -1:]
    for k, history in enumerate(histories):
        pasts.append(wavelet.delays[k](signal, history)[0][0])
        signal = wavelet.split(k, signal, history)[0]
    nets = [net for level in zip(wavelet.predict, wavelet.update, strict=True) for net in level]
    layers = [layer for net in nets for layer in net.modules() if isinstance(layer, nn.Linear)]
    weights, biases = [m.weight for m in layers], [m.bias for m in layers]
    approximations, details = lifting_step(x[0, -1], torch.cat(pasts), weights, biases)
    bands = [approximations[-1], *details.flip(0)]
    for ours, theirs in zip(bands, expected, strict=True):
        torch.testing.assert_close(ours, theirs[0, -1])


class Ran(Exception):
    """The program of this process has run."""


@interpreted
@pytest.mark.parametrize("C, H", [(20, None), (12, 24)])
def test_programs_wait_for_each_other(C, H, monkeypatch):
    """Three of them, each in a process of its own, twice with one counter of arrivals."""
    from triton.runtime import interpreter

    from wavelet_lm.kernels import triton_lifting

    n, parent, builder = 3, os.getpid(), interpreter.interpreter_builder
    children = []

    def begin(x, y, z):
        """The program of a process, in place of all of them in turn."""
        if os.getpid() != parent:
            os._exit(0)
        if x > 0:
            raise Ran
        builder.grid_idx = (0, y, z)
        for number in range(1, n):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                builder.grid_idx = (number, y, z)
                return
            children.append(child)

    monkeypatch.setattr(builder, "set_grid_idx", begin)
    monkeypatch.setattr(triton_lifting, "TILE", 64)
    arrivals = no_arrivals().share_memory_()
    for levels in (2, 3):
        x, pasts, weights, biases = inputs = operands(levels, C, H)
        results = [torch.full_like(pasts, torch.nan).share_memory_() for _ in range(2)]
        hidden = torch.zeros(2 * levels, H or C).share_memory_()
        tiles = triton_lifting.plan(C, H or C, 1)[1]
        try:
            with pytest.raises(interpreter.InterpreterError) as raised:
                triton_lifting.run(x, pasts, weights, biases, arrivals, *results, hidden, n, tiles)
            assert isinstance(raised.value.__cause__, Ran)
        finally:
            if os.getpid() != parent:
                os._exit(1)
        assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0] * (n - 1)
        children.clear()
        check(results, inputs)
        assert arrivals.item() == 0


@compiles
@pytest.mark.parametrize("H", [None, 256])
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_compiles_for_every_gpu_and_prefetches(capability, H):
    """The weights of a product are asked for before the programs wait for its input."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wavelet_lm.kernels import triton_lifting
    from wavelet_lm.kernels.triton_lifting import ALIGNMENT, WARPS, _kernel

    C = 2048
    _, tiles = triton_lifting.plan(C, H or C, 132)
    constants = {"TYPE": tl.bfloat16, "DEEP": H is not None, "ALONE": False, "ALIGNED": ALIGNMENT}
    constants |= tiles
    types = {"layers_ptr": "*i64", "arrivals_ptr": "*i32", "levels": "i32", "C": "i32", "H": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    names = _kernel.arg_names
    source = ASTSource(
        _kernel,
        {name: types.get(name, "*bf16") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in ("C", "H")},
    )
    options = {"num_warps": WARPS, "launch_cooperative_grid": True}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.launch_cooperative_grid
    ptx = compiled.asm["ptx"]
    n_products = 4 if H else 2
    assert len(re.findall(r"atom\.global\.gpu\.acq_rel\.add", ptx)) == n_products
    polls = [m.start() for m in re.finditer(r"ld\.global\.gpu\.acquire", ptx)]
    assert len(polls) >= n_products
    assert "ld.global.v4.b32" in ptx[: polls[0]]


@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="the tests above run in this process"
)
def test_in_the_interpreter():
    said = in_the_interpreter(__file__)
    assert re.search(r"2\d passed", said), said[-400:]
