"""Lifting and Haar: inversion, causality, chunks, and the formulas written out."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._pytree import tree_leaves

from tests.conftest import perturb, tiny_config
from wavelet_lm.models.wavelet_lm.wavelets import build_wavelet
from wavelet_lm.transforms import lifting
from wavelet_lm.transforms.haar import HaarWavelet
from wavelet_lm.transforms.lifting import LiftingWavelet
from wavelet_lm.transforms.packets import WaveletPackets
from wavelet_lm.transforms.wavelet import Wavelet

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
    "packets": {"wavelet_packets": True, "per_scale_mixer_widths": None},
    "haar packets": {
        "wavelet_mode": "haar",
        "wavelet_crawl": False,
        "wavelet_packets": True,
        "per_scale_mixer_widths": None,
    },
    "data-dependent": {"lifting_data_dependent": 2},
    "data-dependent packets": {
        "lifting_data_dependent": 2,
        "lifting_linear_only": True,
        "wavelet_packets": True,
        "per_scale_mixer_widths": None,
    },
    "fixed haar": {"wavelet_mode": "haar", "wavelet_crawl": False},
}
# These do not invert: their reconstruction is not made of the decomposition's own nets alone.
INEXACT = {
    "untied": {"untied_reconstruction": True},
    "two bases": {"multi_basis_lifting": True, "shared_lifting_weights": False},
    "two untied bases of packets": {
        "multi_basis_lifting": True,
        "shared_lifting_weights": False,
        "untied_reconstruction": True,
        "wavelet_packets": True,
        "per_scale_mixer_widths": None,
    },
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
    assert len(bands) == tiny_config(**VARIANTS[variant]).n_scales
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


def test_packets_split_every_band_by_the_step_of_its_level():
    packets = make("packets")
    wavelet = packets.wavelet
    x = torch.randn(2, 20, 8, dtype=torch.float64)

    def leaves(k: int, c: torch.Tensor) -> list[torch.Tensor]:
        if k == 3:
            return [c]
        past, _ = wavelet.delays[k](c)
        d = (past - wavelet.predict[k](c)) / math.sqrt(2)
        a = (c + wavelet.update[k](d)) / math.sqrt(2)
        return leaves(k + 1, a) + leaves(k + 1, d)

    bands, _ = packets.decompose(x)
    torch.testing.assert_close(bands, leaves(0, x), rtol=0, atol=1e-13)
    # The coarsest bands are those of the wavelet that splits the approximation alone.
    a, d, *_ = wavelet.decompose(x)[0]
    torch.testing.assert_close(bands[:2], [a, d], rtol=0, atol=1e-13)


def test_haar_packets_are_walsh_functions_of_the_last_positions():
    """Band n weighs the position j steps back by (−1)^(Σ bits of n and j, n's read backwards)."""
    x = torch.randn(1, 40, 2, dtype=torch.float64)
    bands, _ = WaveletPackets(HaarWavelet(3)).decompose(x)
    for n, band in enumerate(bands):
        reversed_n = int(f"{n:03b}"[::-1], 2)
        signs = [(-1) ** (reversed_n & j).bit_count() for j in range(8)]
        for t in range(8, 40):
            expected = sum(sign * x[:, t - j] for j, sign in enumerate(signs)) / math.sqrt(8)
            torch.testing.assert_close(band[:, t], expected, rtol=0, atol=1e-13)


def test_data_dependent_nets_are_their_formula():
    net = make("data-dependent").update[1]
    A, B, D = net.up.weight, net.down.weight, net.gate.weight
    assert A.shape == (8, 2) and B.shape == D.shape == (2, 8)
    c = torch.randn(1, 5, 8, dtype=torch.float64)
    for t in range(5):
        matrix = A @ torch.diag(torch.tanh(D @ c[0, t])) @ B
        expected = net.net(c[0, t]) + matrix @ c[0, t]
        torch.testing.assert_close(net(c)[0, t], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("init", ["haar", "zero", "random"])
def test_data_dependent_nets_start_as_the_static_ones(init):
    net = LiftingWavelet(3, 8, init, rank=2).predict[2]
    c = torch.randn(3, 8)
    assert torch.equal(net(c), net.net(c))
    net(c).sum().backward()
    assert net.up.weight.grad.any()


def test_haar_bands_are_scaled_block_sums():
    """The approximation of level n is the sum over 2^n positions, over 2^(n/2)."""
    x = torch.randn(1, 40, 2, dtype=torch.float64)
    (a, *_), _ = HaarWavelet(3).decompose(x)
    for t in range(40):
        expected = x[:, max(0, t - 7) : t + 1].sum(1) / math.sqrt(8)
        torch.testing.assert_close(a[:, t], expected, rtol=0, atol=1e-13)


def test_initial_nets():
    eye = torch.eye(8)
    haar = LiftingWavelet(3, 8, "haar", hidden_mult=2)
    first, last = haar.update[0][0], haar.update[0][3]
    assert torch.equal(first.weight[:8], eye)
    assert torch.equal(last.weight[:, :8], 0.5 * eye)
    assert 0.005 < first.weight[8:].std() < 0.02
    assert torch.equal(haar.predict[1][3].weight[:, :8], eye)
    zero = LiftingWavelet(3, 8, "zero")
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
    plain = LiftingWavelet(3, 8, "haar")
    torch.manual_seed(0)
    scaled = LiftingWavelet(3, 8, "haar", level_scaling=True)
    for k in range(3):
        expected = plain.update[k][3].weight / (1 + 0.1 * k)
        torch.testing.assert_close(scaled.update[k][3].weight, expected)


@pytest.mark.parametrize("variant", ["headline", "packets", "data-dependent"])
def test_gradient(variant):
    wavelet = make(variant, channels=2)

    def both_ways(x):
        bands, _ = wavelet.decompose(x)
        return torch.stack(bands), wavelet.reconstruct([b.sin() for b in bands])

    x = torch.randn(1, 10, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(both_ways, x)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("scales_results", [False, True])
def test_a_reconstruction_has_the_gradients_of_its_levels_one_by_one(
    linear, scales_results, monkeypatch
):
    monkeypatch.setattr(lifting, "scales_results", lambda grad: scales_results)
    torch.manual_seed(0)
    wavelet = LiftingWavelet(3, 4, "random", linear=linear).double()
    bands = torch.randn(4, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    inputs = (bands, *wavelet.update.parameters())

    def gradients(signal):
        weights = torch.linspace(-1, 1, signal.numel(), dtype=torch.float64).view_as(signal)
        return torch.autograd.grad((signal.sin() * weights).sum(), inputs)

    together, apart = wavelet.reconstruct(bands), Wavelet.reconstruct(wavelet, bands)
    torch.testing.assert_close(together, apart)
    for got, expected in zip(gradients(together), gradients(apart), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.any()
