"""Scales mixed together against every scale alone, as the formula says."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode

from wavelet_lm.config import ModelConfig
from wavelet_lm.models.wavelet_lm import mixer
from wavelet_lm.models.wavelet_lm.mixer import (
    NarrowMixer,
    Routed,
    alike,
    mix_scales,
    scale_mixers,
    together,
)
from wavelet_lm.transforms.hadamard import HadamardTransform
from wavelet_lm.transforms.lifting import LiftingWavelet

WIDTHS = [(1, 1, 1, 0.5), (1, 0.5, 1, 0.5), (0.5, 0.5, 0.5, 0.5), None]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("switches", [{}, {"low_rank": 0}, {"use_mixer_gate": False}])
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_mixing_together_is_mixing_alone(widths, switches, compiling, routed, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    keys = {"C": 8, "levels": 3, "per_scale_mixer_widths": widths, "low_rank": 2, **switches}
    config = ModelConfig(**keys)
    mixers, H = scale_mixers(config, 0).double(), HadamardTransform(8).double()
    bands = torch.randn(4, 10, 8, dtype=torch.float64)
    routing = torch.randn(4, 4, dtype=torch.float64) if routed else torch.eye(4).double()
    got = together(mix_scales(mixers, [bands], routing if routed else None, H))
    if not (routed or compiling):
        parts = bands.split([len(group) for group in alike(mixers)])
        of_parts = mix_scales(mixers, parts, None, H, None, torch.arange(4.0).double())
        factors = torch.arange(4)[:, None, None]
        torch.testing.assert_close(together(of_parts), factors * got)
    for s, each in enumerate(mixers):
        x, gate = H(bands[s]), H(sum(routing[s, r] * bands[r] for r in range(4)))
        core = each
        if isinstance(each, NarrowMixer):
            x, gate, core = x @ each.A.T, gate @ each.A.T, each.mixer
        y = x @ core.W.T
        if core.G is not None:
            y = y * silu(gate @ core.G.T)
        if core.U is not None:
            y = y + (x @ core.V) @ core.U.T
        torch.testing.assert_close(got[s], y @ each.B.T if core is not each else y)


def test_products_are_batched_unless_a_step_is_compiled_on_a_cpu():
    config = ModelConfig(C=8, levels=3, per_scale_mixer_widths=None, low_rank=2)
    mixers, H = scale_mixers(config, 0), HadamardTransform(8)
    wavelet = LiftingWavelet(3, 8)
    bands, routing = torch.randn(4, 10, 8), torch.eye(4)
    traced, ran = [], []

    def both():
        mixed = together(mix_scales(mixers, [bands], routing, H))
        return wavelet.reconstruct(mixed.view(4, 2, 5, 8).unbind())

    def backend(graph, inputs):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(str(function))
            return function(*args, **(kwargs or {}))

    with Recorder():
        expected = both()
    torch.testing.assert_close(torch.compile(both, backend=backend)(), expected)
    assert any("bmm" in name for name in ran)
    assert traced and not any("bmm" in name for name in traced)


@pytest.mark.parametrize("sizes", [[3], [2, 1]])
@pytest.mark.parametrize("written_out", [False, True])
def test_routing_is_a_weighted_sum_with_its_gradients(sizes, written_out, monkeypatch):
    monkeypatch.setattr(mixer, "sums_are_written_out", lambda bands: written_out)
    routing = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    bands = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("rs,snc->rnc", routing, bands)
    parts = Routed.apply(routing, bands, sizes)
    assert [len(part) for part in parts] == sizes
    torch.testing.assert_close(torch.cat(parts), expected)
    assert gradcheck(Routed.apply, (routing, bands, sizes))
