"""Muon in stacks beside PyTorch's, which takes one matrix after another."""

import pytest
import torch

from wavelet_lm.training import muon
from wavelet_lm.training.muon import Muon, orthogonal, stacks

SHAPES = [(16, 16)] * 3 + [(8, 32)] * 2 + [(32, 8), (16, 16), (4, 16)]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="of PyTorch 2.9")
@pytest.mark.parametrize("largest", [2**24, 600, 1])
def test_stacks_take_the_steps_of_single_matrices(monkeypatch, largest):
    monkeypatch.setattr(muon, "STACK_VALUES", largest)
    ours, theirs = parameters(), parameters()
    stacked = Muon(ours, lr=0.02, weight_decay=0.1)
    single = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        for p, q, g in zip(ours, theirs, parameters(seed + 1), strict=True):
            p.grad, q.grad = g.detach().clone(), g.detach().clone()
        ours[-1].grad = theirs[-1].grad = None
        stacked.step()
        single.step()
    for p, q in zip(ours, theirs, strict=True):
        # Up to where bfloat16 rounds an update, of 0.02 · 0.2 · √size, differently.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        a, b = stacked.state[p]["momentum_buffer"], single.state[q]["momentum_buffer"]
        assert torch.equal(a, b)
    assert not stacked.state[ours[-1]]


def test_a_stack_has_one_shape_and_an_end():
    found = list(stacks(parameters()))
    assert [len(part) for part in found] == [4, 2, 1, 1]
    assert all(len({p.shape for p in part}) == 1 for part in found)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 8, 40), (2, 40, 8)])
def test_what_is_orthogonal_is_nearly_so(shape):
    """Singular values come between 0.5 and 1.5, singular vectors stay."""
    u, s, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    x = u @ torch.diag_embed(0.2 + torch.rand_like(s)) @ vt  # what is near 0 takes more steps
    found = u.mT @ orthogonal(x).float() @ vt.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert bool(((values > 0.3) & (values < 1.5)).all())
    assert (found - torch.diag_embed(values)).abs().max() < 0.1


def test_a_cpu_without_bfloat16_iterates_in_float32(monkeypatch):
    """To the same matrices, up to what bfloat16 rounds."""
    x = torch.randn(3, 24, 40)
    muon.step_dtype.cache_clear()
    monkeypatch.setattr(muon, "_cpu_multiplies_bfloat16", lambda: True)
    rounded = orthogonal(x)
    muon.step_dtype.cache_clear()
    monkeypatch.setattr(muon, "_cpu_multiplies_bfloat16", lambda: False)
    exact = orthogonal(x)
    muon.step_dtype.cache_clear()
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    assert muon.step_dtype("cuda") == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05)
