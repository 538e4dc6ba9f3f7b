"""The layers of a block that have a form for a compiled step on a GPU."""

import pytest
import torch

from wavelet_lm.config import Config
from wavelet_lm.models.wavelet_lm.layers import NormalizedBands, ScaleNorm

SMALL = {"C": 16, "levels": 2, "wavelet_decomp_norm": True, "per_scale_mixer_widths": None}


def scale_norm():
    torch.manual_seed(0)
    norm = ScaleNorm(Config(**SMALL)).double()
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    return norm


@pytest.mark.parametrize("has_signal", [False, True])
def test_the_form_of_a_gpu_is_that_of_every_step(has_signal):
    norm, (S, B, T, C) = scale_norm(), (3, 2, 5, 16)
    x = torch.randn(S, B, T, C, dtype=torch.float64, requires_grad=True)
    added = [torch.randn(*shape, dtype=torch.float64) for shape in ((S, C), (B, T, C))]
    added = [a.requires_grad_() for a in added] if has_signal else []
    given = (x, norm.weight, norm.bias, *added)
    theirs = norm(x, added=tuple(added) or None)
    rows = added[1].flatten(0, 1) if has_signal else None
    gains = added[0] if has_signal else None
    ours = NormalizedBands.apply(x.flatten(1, 2), norm.weight, norm.bias, gains, rows).view_as(x)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    ours, theirs = (torch.autograd.grad(y, given, grad) for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_factors_multiply_what_a_scale_gives():
    norm, factors = scale_norm(), torch.randn(3, dtype=torch.float64)
    x = torch.randn(3, 2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(norm(x, factors), norm(x) * factors[:, None, None, None])
