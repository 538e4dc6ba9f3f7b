"""The read of product-key memories as one kernel beside its plain twin.

Without a GPU the comparisons run in Triton's interpreter, in a process of its own
(`test_in_the_interpreter`), and the kernel is compiled for the GPUs that it is meant for.
"""

import re

import pytest
import torch

from tests.kernels.interpreter import in_the_interpreter
from tests.kernels.test_triton_adagrad import DEVICE, INTERPRETED, compiles, on_a_device
from wavelet_lm.kernels.product_keys import product_key_read
from wavelet_lm.models.wavelet_lm.memory import ProductKeyMemory

triton = pytest.importorskip("triton")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def operands(n_memories, heads, n, top_k, C, dtype=torch.float32):
    """Scores of which no two pairs have equal sums, in either dtype: i · n and j, permuted."""
    generator = torch.Generator().manual_seed(n + C)

    def permuted():
        return torch.randperm(n, generator=generator) - n // 2

    def scores():
        pairs = [torch.stack((permuted() * n, permuted())) for _ in range(heads)]
        return (torch.stack(pairs).double() / n).to(dtype).to(DEVICE)

    with torch.device("meta"):
        memory = ProductKeyMemory(2 * heads, n * n, top_k, heads)
    lookup = memory.lookup
    i, j = torch.meshgrid(*[torch.arange(lookup.n_best)] * 2, indexing="ij")
    ranks = [r[(i + 1) * (j + 1) <= lookup.top_k].to(DEVICE) for r in (i, j)]
    values = [
        torch.randn(heads * n * n, C, generator=generator).to(dtype).to(DEVICE)
        for _ in range(n_memories)
    ]
    return [scores() for _ in range(n_memories)], values, *ranks, lookup


@on_a_device
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    "n_memories, heads, n, top_k, C",
    [(2, 1, 128, 32, 96), (1, 2, 12, 7, 40), (2, 3, 4, 3, 64), (1, 1, 5, 25, 130), (1, 1, 3, 1, 8)],
)
def test_equals_the_twin(n_memories, heads, n, top_k, C, dtype):
    from wavelet_lm.kernels.triton_product_keys import launch

    scores, values, *ranks, lookup = operands(n_memories, heads, n, top_k, C, dtype)
    expected = product_key_read(
        [s.double() for s in scores], [v.double() for v in values], *ranks, lookup
    )
    ours = launch(scores, values, *ranks, *lookup)
    assert ours.shape == (n_memories, C) and ours.dtype == dtype
    assert (ours.double() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


@on_a_device
def test_scores_of_all_signs_and_sizes_are_ordered():
    """The best are the largest, not the nearest to zero nor the farthest."""
    from wavelet_lm.kernels.triton_product_keys import launch

    a = torch.tensor([-3e38, -1.0, -1e-30, 0.0, 1e-30, 2.0, float("-inf"), 1e-42], device=DEVICE)
    b = torch.tensor([-5.0, -4.0, -3.0, -2.0, -9.0, -8.0, -7.0, -6.0], device=DEVICE)
    values = torch.eye(64, device=DEVICE)
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    y = launch([torch.stack((a, b))[None]], [values], one, one, 1, 1, 64)
    assert y[0].argmax() == 5 * 8 + 3 and y[0].max() == 1


def test_the_twin_is_the_memory():
    torch.manual_seed(1)
    memory = ProductKeyMemory(12, 25, 6, 3).double()
    x = torch.randn(1, 1, 12, dtype=torch.float64)
    scores = memory.scores(memory.query(x))[0, 0]
    ranks = memory.ranks_a, memory.ranks_b
    ours = product_key_read([scores], [memory.values.weight], *ranks, memory.lookup)
    torch.testing.assert_close(ours, memory(x)[0])


@compiles
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_compiles_for_every_gpu(capability, heads):
    """With the headline's sizes; it reads 64 columns of 32 rows, eight numbers at once."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wavelet_lm.kernels.triton_product_keys import COLUMNS, WARPS, _kernel

    constants = {"TOP_K": 32, "WIDTH": 128, "BEST": 32, "PAIRS": 128, "READ": 32}
    constants["COLUMNS"] = COLUMNS
    if heads == 1:  # which Triton takes for a constant
        constants["heads"] = 1
    types = {"ranks_a_ptr": "*i64", "ranks_b_ptr": "*i64"}
    types |= dict.fromkeys(("heads", "n", "pairs", "num_keys", "C"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    names = _kernel.arg_names
    divisible = [n for n in names if n not in constants and n not in ("heads", "pairs")]
    source = ASTSource(
        _kernel,
        {name: types.get(name, "*bf16") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": WARPS}).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= COLUMNS * 32 // (8 * 32 * WARPS)
    assert ".local" not in ptx  # nothing is spilled or indexed in memory


@pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="the tests above run in this process"
)
def test_in_the_interpreter():
    said = in_the_interpreter(__file__)
    assert re.search(r"1\d passed", said), said[-400:]
