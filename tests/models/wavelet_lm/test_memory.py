import pytest
import torch
from torch.autograd import gradcheck

from wavelet_lm.models.wavelet_lm.memory import ProductKeyMemory

SIZES = [(16, 16, 3, 1), (16, 64, 8, 2), (12, 25, 5, 3), (8, 4, 32, 1), (16, 49, 20, 2)]


def make(C, num_keys, top_k, heads):
    memory = ProductKeyMemory(C, num_keys, top_k, heads).double()
    for p in memory.parameters():
        p.data.normal_()
    return memory


def brute_force(memory: ProductKeyMemory, x: torch.Tensor, top_k: int) -> torch.Tensor:
    """Score every one of the num_keys keys, head by head."""
    n = memory.n_subkeys
    y = torch.zeros_like(x)
    queries = memory.query(x).view(*x.shape[:2], memory.heads, 2, -1)
    for h in range(memory.heads):
        keys = torch.stack(
            [torch.cat([a, b]) for a in memory.keys_a.weight[h] for b in memory.keys_b.weight[h]]
        )  # [n², C / heads]
        scores = queries[:, :, h].flatten(-2) @ keys.T
        best, index = scores.topk(min(top_k, n * n, min(top_k, n) ** 2))
        rows = memory.values.weight[h * n * n + index]
        y += (best.softmax(-1)[..., None] * rows).sum(-2)
    return y


@pytest.mark.parametrize("size", SIZES)
def test_equals_brute_force_over_all_keys(size):
    memory = make(*size)
    x = torch.randn(2, 30, size[0], dtype=torch.float64)
    expected = brute_force(memory, x, size[2])
    torch.testing.assert_close(memory(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_scores_at_once_are_those_of_the_halves(size):
    memory = make(*size)
    q = torch.randn(2, 7, size[0], dtype=torch.float64)
    torch.testing.assert_close(memory.scores_at_once(q), memory.scores(q), rtol=1e-12, atol=1e-12)


def test_reads_few_rows_with_weights_that_sum_to_one():
    memory = make(16, 64, 8, 2)
    rows, weights = memory.read_plan(torch.randn(2, 5, 16, dtype=torch.float64))
    assert rows.shape == weights.shape == (2, 5, 2, 8)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5, 2, dtype=torch.float64))
    assert (rows[:, :, 0] < 64).all() and (rows[:, :, 1] >= 64).all()


def test_gradient():
    memory = make(8, 16, 4, 2)
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    parameters = list(memory.parameters())
    assert gradcheck(lambda x, *_: memory(x), (x, *parameters))


def test_only_rows_that_were_read_get_a_gradient():
    memory = make(8, 64, 4, 1)
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    rows, _ = memory.read_plan(x)
    memory(x).sum().backward()
    touched = memory.values.weight.grad.abs().sum(-1).nonzero().flatten()
    assert set(touched.tolist()) == set(rows.flatten().tolist())
