"""Lifting and Haar: inversion, causality, chunks, and the formulas written out."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._pytree import tree_leaves

from tests.conftest import perturb, tiny_config
from wavelet_lm.transforms.haar import HaarWavelet
from wavelet_lm.transforms.lifting import LiftingWavelet, build_wavelet

VARIANTS = {
    "headline": {},
    "haar init": {"lifting_init": "haar", "wavelet_crawl": False},
    "zero init": {"lifting_init": "zero"},
    "random init": {"lifting_init": "random"},
    "linear": {"lifting_linear_only": True},
    "wide nets": {"lifting_hidden_mult": 3},
    "long crawl": {"wavelet_crawl_k": 11},
    "no crawl": {"wavelet_crawl": False},
    "level scaling": {"stab_lifting_level_scaling": True},
    "fixed haar": {"wavelet_mode": "haar", "wavelet_crawl": False},
}
# These do not invert: their reconstruction is not made of the decomposition's own nets alone.
INEXACT = {
    "untied": {"untied_reconstruction": True},
    "two bases": {"multi_basis_lifting": True, "shared_lifting_weights": False},
    "three untied bases": {
        "multi_basis_lifting": True,
        "multi_basis_inits": ("zero", "haar", "random"),
        "shared_lifting_weights": False,
        "untied_reconstruction": True,
    },
}


def make(variant: str, channels: int = 8):
    config = tiny_config(**(VARIANTS | INEXACT)[variant])
    return perturb(build_wavelet(config, channels).double().eval())


@pytest.mark.parametrize("variant", VARIANTS)
def test_reconstruction_is_exact(variant):
    wavelet = make(variant)
    x = torch.randn(2, 50, 8, dtype=torch.float64)
    bands, _ = wavelet.decompose(x)
    assert len(bands) == 4
    torch.testing.assert_close(wavelet.reconstruct(bands), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS | INEXACT)
def test_the_future_changes_no_bit(variant):
    wavelet = make(variant)
    x = torch.randn(2, 50, 8, dtype=torch.float64)
    y = x.clone()
    y[:, 30:] = torch.randn(2, 20, 8)
    for before, after in zip(wavelet.decompose(x)[0], wavelet.decompose(y)[0], strict=True):
        assert torch.equal(before[:, :30], after[:, :30])
        assert not torch.equal(before[:, 30:], after[:, 30:])


@pytest.mark.parametrize("variant", VARIANTS | INEXACT)
def test_any_chunks_give_the_same_bands(variant):
    wavelet = make(variant)
    x = torch.randn(2, 60, 8, dtype=torch.float64)
    whole, _ = wavelet.decompose(x)
    state, parts = None, []
    for chunk in x.split([1, 2, 20, 1, 30, 6], dim=1):
        kept = None if state is None else [h.clone() for h in tree_leaves(state)]
        bands, new_state = wavelet.decompose(chunk, state)
        if kept is not None:
            assert all(map(torch.equal, tree_leaves(state), kept)), "the passed state changed"
        state = new_state
        parts.append(torch.stack(bands))
    torch.testing.assert_close(torch.cat(parts, 2), torch.stack(whole), rtol=0, atol=1e-12)


def test_lifting_is_its_formula():
    wavelet = make("no crawl")
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    bands, _ = wavelet.decompose(x)
    c = x
    for k in range(3):
        past = torch.zeros_like(c)
        past[:, 2**k :] = c[:, : -(2**k)]
        d = (past - wavelet.predict[k](c)) / math.sqrt(2)
        c = (c + wavelet.update[k](d)) / math.sqrt(2)
        torch.testing.assert_close(bands[3 - k], d, rtol=0, atol=1e-13)
    torch.testing.assert_close(bands[0], c, rtol=0, atol=1e-13)


def test_haar_bands_are_scaled_block_sums():
    """The approximation of level n is the sum over 2^n positions, over 2^(n/2)."""
    x = torch.randn(1, 40, 2, dtype=torch.float64)
    (a, *_), _ = HaarWavelet(3).decompose(x)
    for t in range(40):
        expected = x[:, max(0, t - 7) : t + 1].sum(1) / math.sqrt(8)
        torch.testing.assert_close(a[:, t], expected, rtol=0, atol=1e-13)


def test_initial_nets():
    eye = torch.eye(8)
    haar = LiftingWavelet(tiny_config(lifting_hidden_mult=2), 8, "haar")
    first, last = haar.update[0][0], haar.update[0][3]
    assert torch.equal(first.weight[:8], eye)
    assert torch.equal(last.weight[:, :8], 0.5 * eye)
    assert 0.005 < first.weight[8:].std() < 0.02
    assert torch.equal(haar.predict[1][3].weight[:, :8], eye)
    zero = LiftingWavelet(tiny_config(), 8, "zero")
    assert not zero.predict[0][3].weight.any()
    for wavelet in (haar, zero):
        assert not any(p.any() for n, p in wavelet.named_parameters() if n.endswith("bias"))


def test_bases_are_mixed_per_scale():
    wavelet = make("two bases")
    wavelet.weights.data.normal_()
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    w = wavelet.weights.softmax(0)
    first, second = (basis.decompose(x)[0] for basis in wavelet.bases)
    bands, _ = wavelet.decompose(x)
    for s in range(4):
        torch.testing.assert_close(bands[s], w[0, s] * first[s] + w[1, s] * second[s])
    expected = sum(w[b, 0] * basis.reconstruct(bands) for b, basis in enumerate(wavelet.bases))
    torch.testing.assert_close(wavelet.reconstruct(bands), expected)


def test_a_new_multi_basis_wavelet_nearly_inverts():
    wavelet = build_wavelet(tiny_config(**INEXACT["two bases"]), 8).double()
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    error = (wavelet.reconstruct(wavelet.decompose(x)[0]) - x).norm() / x.norm()
    assert error < 1e-3


def test_level_scaling():
    torch.manual_seed(0)
    plain = LiftingWavelet(tiny_config(), 8, "haar")
    torch.manual_seed(0)
    scaled = LiftingWavelet(tiny_config(stable_parametrization=True), 8, "haar")
    for k in range(3):
        expected = plain.update[k][3].weight / (1 + 0.1 * k)
        torch.testing.assert_close(scaled.update[k][3].weight, expected)


def test_gradient():
    wavelet = make("headline", channels=2)

    def both_ways(x):
        bands, _ = wavelet.decompose(x)
        return torch.stack(bands), wavelet.reconstruct([b.sin() for b in bands])

    x = torch.randn(1, 10, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(both_ways, x)
