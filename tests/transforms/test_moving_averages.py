"""The moving averages against their definitions, position by position and channel by channel."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavelet_lm.errors import UserError
from wavelet_lm.transforms.history import Clock, Ring
from wavelet_lm.transforms.moving_averages import (
    MovingAverages,
    channel_levels,
    filtered,
    haar_kernels,
    wavelet_kernels,
)

KINDS = ("haar", "learnable", "ema", "db2", "sym4", "coif1", "bior2.2", "dmey")


def signal(B, T, E, dtype=torch.float64):
    return torch.randn(B, T, E, generator=torch.Generator().manual_seed(T), dtype=dtype)


def module(kind, E=20, context=32, fraction=0.5, shared=False):
    """In float64, with learned kernels of no special value."""
    averages = MovingAverages(kind, E, context, fraction, shared).double()
    with torch.no_grad():
        for p in averages.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return averages


def slow_mean(x, i0, context):
    """The definition of `haar` in the paper, as loops."""
    _, T, E = x.shape
    y = x.clone()
    for i in range(i0, E):
        step = math.floor((i - i0) * math.floor(math.log2(context)) / (E - i0))
        f = 2 ** (1 + step)
        for t in range(T):
            y[:, t, i] = sum(x[:, t - o, i] for o in range(f) if t >= o) / f
    return y


@pytest.mark.parametrize(
    ("E", "fraction", "context"), [(20, 0.5, 32), (12, 1.0, 50), (16, 0.25, 64), (7, 0.5, 2)]
)
def test_haar_is_the_mean_of_the_window(E, fraction, context):
    x = signal(2, 40, E)
    averages = MovingAverages("haar", E, context, fraction).double()
    y, _ = averages(x)
    torch.testing.assert_close(y, slow_mean(x, E - round(fraction * E), context))
    assert torch.equal(y[..., : averages.n_kept], x[..., : averages.n_kept])


@pytest.mark.parametrize("shared", [False, True])
def test_learnable_starts_as_haar(shared):
    x = signal(2, 100, 20, torch.float32)
    learnable = MovingAverages("learnable", 20, 32, 0.5, shared)
    y, _ = learnable(x)
    expected, _ = MovingAverages("haar", 20, 32)(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_learned_kernels_are_one_a_channel_or_one_a_level(shared):
    """Channel by channel: the gradient of a tap says which input it is multiplied by."""
    averages = module("learnable", shared=shared)
    x = signal(1, 40, 20)
    y, _ = averages(x)
    kernels = averages.filter.kernels()
    for c, level in enumerate(channel_levels(10, 32)):
        kernel = kernels[:, c]
        assert (kernel[2**level :] == 0).all()
        expected = np.convolve(x[0, :, 10 + c], kernel.detach())[:40]
        np.testing.assert_allclose(y[0, :, 10 + c].detach(), expected, atol=1e-12)
    levels = [2**level for level in channel_levels(10, 32)]
    assert averages.filter.weights.numel() == sum(set(levels) if shared else levels)
    same = torch.equal(kernels[:, 0], kernels[:, 1])
    assert same == shared  # two channels of one level
    (gradient,) = torch.autograd.grad(y.sum(), averages.filter.weights)
    assert (gradient != 0).all()


def test_the_paper_has_about_65k_kernel_weights_and_9k_shared_ones():
    n = [
        9 * MovingAverages("learnable", 128, 512, 0.5, shared).filter.weights.numel()
        for shared in (False, True)
    ]
    assert n == [64_404, 9 * 1022]


def test_ema_is_its_recursion():
    x = signal(2, 50, 20)
    y, _ = MovingAverages("ema", 20, 32).double()(x)
    expected, s = x.clone(), x[:, 0, 10:]
    alpha = torch.arange(1, 11).double() / 10
    for t in range(50):
        s = alpha * x[:, t, 10:] + (1 - alpha) * s
        expected[:, t, 10:] = s
    # The factors are float32 numbers.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    assert torch.equal(y[:, 0, -1], x[:, 0, -1])


# --- families ------------------------------------------------------------------------------------


def test_every_family_is_normalised_and_no_longer_than_the_context():
    pywt = pytest.importorskip("pywt")
    for name in pywt.wavelist(kind="discrete"):
        kernels = wavelet_kernels(name, 6, 64)
        assert len(kernels) == 6 and max(map(len, kernels)) <= 64
        for kernel in kernels:
            assert abs(kernel.sum() - 1) < 1e-12 and np.abs(kernel).max() < 1.5, name


@pytest.mark.parametrize("name", ["haar", "db1"])
def test_haar_of_the_families_is_haar(name):
    pytest.importorskip("pywt")
    for a, b in zip(wavelet_kernels(name, 9, 512), haar_kernels(9), strict=True):
        assert np.array_equal(a, b)
    x = signal(2, 70, 20)
    expected, _ = MovingAverages("haar", 20, 64).double()(x)
    if name != "haar":
        assert torch.equal(MovingAverages(name, 20, 64).double()(x)[0], expected)


@pytest.mark.parametrize("name", ["db2", "sym4", "coif1", "bior2.2"])
def test_a_kernel_that_fits_is_pywavelets_undecimated_approximation(name):
    """But for its delay, and its scale, √2 a level."""
    pywt = pytest.importorskip("pywt")
    levels, N = 3, 256
    x = np.random.default_rng(0).standard_normal(N)
    approximation = pywt.swt(x, name, level=levels, trim_approx=True)[0] / 2 ** (levels / 2)
    kernel = wavelet_kernels(name, levels, N)[-1]
    padded = np.zeros(N)
    padded[: len(kernel)] = kernel
    # swt is periodic, and looks ahead: as correlation rather than convolution.
    spectrum = np.fft.fft(x) * np.fft.fft(padded).conj()
    ours = np.fft.ifft(spectrum).real
    gap = [np.abs(np.roll(ours, shift) - approximation).max() for shift in range(N)]
    assert min(gap) < 1e-9


def test_what_is_cut_is_the_largest_part():
    pytest.importorskip("pywt")
    whole, cut = wavelet_kernels("db4", 6, 1000)[-1], wavelet_kernels("db4", 6, 64)[-1]
    sums = [whole[i : i + 64].sum() for i in range(len(whole) - 63)]
    best = int(np.argmax(sums))
    np.testing.assert_allclose(cut, whole[best : best + 64] / max(sums), atol=1e-12)
    assert max(sums) > 0.5


# --- causal, in chunks, long ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_changes_nothing_bit_for_bit(kind):
    averages = module(kind, context=64).float()
    x = signal(2, 150, 20, torch.float32)
    for t in (1, 63, 64, 100):
        other = x.clone()
        other[:, t:] = 1e3 * torch.randn(2, 150 - t, 20)
        assert torch.equal(averages(x)[0][:, :t], averages(other)[0][:, :t])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_chunks_say_what_the_whole_says(kind, sizes):
    averages = module(kind)
    x = signal(2, sum(sizes), 20)
    expected, end = averages(x)
    state, parts = None, []
    for part in x.split(sizes, dim=1):
        before = None if state is None else state.clone()
        y, new = averages(part, state)
        assert before is None or torch.equal(before, state)
        state = new
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state, end, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_rings_say_what_histories_say(kind):
    averages = module(kind)
    x = signal(3, 90, 20)
    expected, _ = averages(x)
    _, state = averages(x[:, :7])
    clock = Clock(torch.full((3,), 7))
    ring, at = Ring(state, clock, max_step=4), 7
    for T in [1, 4, 2, 3] * 8:
        y, new = averages(x[:, at : at + T], ring)
        assert new is ring
        torch.testing.assert_close(y, expected[:, at : at + T], rtol=1e-9, atol=1e-11)
        back = min(T - 1, 1)
        clock.advance(T - back)
        at += T - back
    _, state = averages(x[:, :at])
    torch.testing.assert_close(ring.history(), state, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["haar", "learnable", "ema", "db2"])
def test_65536_positions_in_float32(kind):
    """A signal with a mean far from zero, which sums that run on would lose digits of."""
    T, E = 65_536, 16
    x = signal(1, T, E) + 3
    averages = MovingAverages(kind, E, 512)
    y, _ = averages(x.float())
    wide, _ = averages.double()(x.float().double())
    assert (y.double() - wide).abs().max() <= 1e-5
    expected = slow_mean(x[:, -600:].float().double(), E // 2, 512)[:, -1]
    if kind in ("haar", "learnable"):
        assert (y[:, -1] - expected).abs().max() <= 1e-5


def test_a_window_of_65536_positions():
    x = signal(1, 65_536, 1).float() + 3
    y, _ = MovingAverages("haar", 16, 65_536, 1.0)(x.expand(-1, -1, 16))
    for level in (15, 16):
        expected = x[0, -(2**level) :, 0].double().mean()
        assert abs(y[0, -1, level - 1].double() - expected) <= 1e-5


@given(st.integers(1, 90), st.integers(1, 70))
def test_blocks_are_the_direct_sum(T, K):
    x, kernels = signal(2, T + K - 1, 3), signal(1, K, 3)[0]
    expected = sum(kernels[o] * x[:, K - 1 - o : K - 1 - o + T] for o in range(K))
    torch.testing.assert_close(filtered(x, kernels), expected)


def test_in_bfloat16_sums_are_taken_in_float32():
    averages = MovingAverages("haar", 16, 512)
    x = (signal(1, 600, 16) + 3).bfloat16()
    y, state = averages(x)
    expected, _ = averages(x.float())
    assert y.dtype == state.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("db22222", 16, 32), r"wavelet_module is 'db22222'; it must be .* such as db22"),
        (("morl", 16, 32), r"wavelet_module is 'morl'"),
        (("haar", 4, 32, 0.1), r"wavelet_fraction 0\.1 of 4 channels .* leave nothing"),
        (("haar", 4, 1), r"and 1 positions leave nothing"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    pytest.importorskip("pywt")
    with pytest.raises(UserError, match=message):
        MovingAverages(*arguments)


def test_a_missing_library_is_named_with_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    MovingAverages("haar", 16, 32)
    with pytest.raises(UserError, match=r"PyWavelets; install it with python -m pip install"):
        MovingAverages("db2", 16, 32)
