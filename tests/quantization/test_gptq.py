"""Compensated rounding against its definition, column by column."""

import pytest
import torch

from wavelet_lm.quantization import gptq
from wavelet_lm.quantization.gptq import InputMoments, quantize_compensated
from wavelet_lm.quantization.weights import quantize_weight

LEVELS = {4: torch.arange(16).double() - 7.5, 2: torch.arange(4).double() - 1.5}
low_bits = pytest.mark.parametrize("bits", [4, 2])


def correlated(n, M, K, seed=0):
    """Inputs [n, M, K] whose channels depend on each other."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, K, K, generator=g) / K**0.5 + 2 * torch.randn(n, 1, K, generator=g)
    return torch.randn(n, M, K, generator=g) @ mixing


def moments_of(x):
    moments = InputMoments(len(x))
    moments.add(x)
    return moments


def slow(W, x, bits, group_size):
    """One matrix [N, K] in float64: after each column, the best of all that is still to come."""
    W, x = W.double().clone(), x.double()
    H = x.T @ x
    unread = torch.diag((H.diagonal() == 0).double())
    H = H + unread + gptq.DAMPING * H.diagonal().mean() * torch.eye(len(H))
    K = W.shape[1]
    Q = torch.zeros_like(W)
    for i in range(K):
        if i % group_size == 0:
            most = W[:, i : i + group_size].abs().amax(1) / LEVELS[bits].max()
            scale = most.float().bfloat16()
            up = torch.nextafter(scale, torch.full_like(scale, torch.inf))
            scale = torch.where(scale.double() < most, up, scale).double()
        values = LEVELS[bits] * scale[:, None]
        nearest = (values - W[:, i, None]).abs().argmin(1)
        Q[:, i] = values.gather(1, nearest[:, None])[:, 0]
        error = W[:, i] - Q[:, i]
        rest = slice(i + 1, K)
        if i + 1 < K:
            W[:, rest] += error[:, None] * torch.linalg.solve(H[rest, rest], H[rest, i])
    return Q


def product_error(x, W, Q):
    return (x.double() @ (W.double() - Q.double()).mT).square().sum((1, 2))


@low_bits
@pytest.mark.parametrize(("n", "N", "K", "group_size"), [(2, 5, 48, 16), (1, 9, 41, 32)])
def test_each_column_is_made_up_for_by_those_that_follow(bits, n, N, K, group_size):
    W, x = torch.randn(n, N, K), correlated(n, 60, K)
    x[:, :, 3] = 0  # a channel that never occurs
    found = quantize_compensated(W, bits, group_size, moments_of(x))
    Q = found.dequantized(torch.float64)
    for i in range(n):
        torch.testing.assert_close(Q[i], slow(W[i], x[i], bits, group_size), rtol=1e-6, atol=1e-6)
    assert found.scales.dtype == torch.bfloat16
    plain = quantize_weight(W, bits, group_size)
    assert found.codes.shape == plain.codes.shape
    assert found.scales.shape == plain.scales.shape


@low_bits
def test_products_are_closer_than_with_plain_rounding(bits):
    W, x = torch.randn(3, 24, 96), correlated(3, 400, 96)
    compensated = quantize_compensated(W, bits, 32, moments_of(x)).dequantized()
    plain = quantize_weight(W, bits, 32).dequantized()
    assert (product_error(x, W, compensated) < 0.5 * product_error(x, W, plain)).all()


def test_without_correlations_it_is_plain_rounding():
    W = torch.randn(2, 7, 40)
    for x in (torch.eye(40).expand(2, -1, -1), torch.zeros(2, 3, 40)):
        found, plain = quantize_compensated(W, 4, 16, moments_of(x)), quantize_weight(W, 4, 16)
        assert torch.equal(found.codes, plain.codes)
        assert torch.equal(found.scales, plain.scales)


def test_moments_are_those_of_all_inputs_and_of_one_matrix_alone():
    x = torch.randn(3, 10, 5)
    moments = InputMoments(3)
    moments.add(x[:, :6])
    for i in (2, 0, 1):
        moments.add(x[i : i + 1, 6:], i)
    torch.testing.assert_close(moments.blocks[0], x.mT @ x)
    assert InputMoments(3).blocks == []  # never read


def test_wide_matrices_are_compensated_in_blocks(monkeypatch):
    monkeypatch.setattr(gptq, "BLOCK", 32)
    W, x = torch.randn(2, 6, 80), correlated(2, 200, 80)
    moments = moments_of(x)
    assert [block.shape[-1] for block in moments.blocks] == [32, 32, 16]
    found = quantize_compensated(W, 4, 16, moments)
    parts = [
        quantize_compensated(W[..., s], 4, 16, moments_of(x[..., s]))
        for s in (slice(0, 32), slice(32, 64), slice(64, 80))
    ]
    assert torch.equal(found.dequantized(), torch.cat([p.dequantized() for p in parts], -1))


@low_bits
def test_few_inputs_and_inputs_of_any_size_give_finite_weights(bits):
    W = torch.randn(1, 6, 64)
    spread = correlated(1, 30, 64) * torch.logspace(-3, 3, 64)
    for x in (correlated(1, 1, 64), spread, 1e-18 * spread, 1e12 * spread):
        found = quantize_compensated(W, bits, 32, moments_of(x)).dequantized()
        assert found.isfinite().all()
        assert (found - W).norm() < 10 * W.norm()
