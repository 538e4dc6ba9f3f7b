"""The forms that a compiled training step on a GPU takes, against those of every other step."""

import sys

import pytest
import torch

from tests.conftest import perturb
from wavelet_lm.config import Config
from wavelet_lm.models.registry import build_model

SMALL = {"C": 16, "layers": 2, "levels": 3, "block_size": 12, "mlp_expansion": 2}
HEADLINE = {
    **SMALL,
    "per_scale_mixer_widths": (1, 1, 0.5, 0.5),
    "pkm_enabled": True,
    "pkm_num_keys": 16,
    "pkm_top_k": 16,  # all of them: what is chosen jumps
    "fwpkm_enabled": True,
    "fwpkm_num_keys": 16,
    "fwpkm_top_k": 16,
    "low_rank": 2,
}
MINI = {
    **SMALL,
    "mlp_expansion": 0,
    "wavelet_decomp_norm": True,
    "wavelet_recon_norm": True,
    "mixer_transform": "identity",
    "wavelet_crawl_k": 5,
    "per_scale_mixer_widths": (1, 1, 0.5, 0.5),
    "skip_proj_out": True,
}
QUICK = {
    **SMALL,
    "lifting_linear_only": True,
    "delta_memory": True,
    "cross_scale_gating": False,
    "per_scale_mixer_widths": None,
}
LIFTING = {
    **SMALL,
    "cross_scale_gating": False,
    "per_scale_mixer_widths": (1, 1, 0.5, 0.5),
    "low_rank": 2,
    "decompose_bypass": False,
}
CONFIGS = pytest.mark.parametrize(
    "keys",
    [
        HEADLINE,
        MINI,
        QUICK,
        LIFTING,
        LIFTING | {"decompose_bypass": True},
        LIFTING | {"phase_gating": True, "decompose_bypass": True},
        LIFTING | {"mixer_depth": 2, "mixer_depth_residuals": True},
        LIFTING | {"mixer_exp_parametrization": True, "C": 12},
    ],
    ids=["headline", "mini", "quick", "lifting", "mean", "phase", "deep", "exponential"],
)
DROPOUT = {
    f"dropout_{part}": 0.3 for part in ("embedding", "projection", "mixer", "mlp", "lm_head")
}


def take_the_gpus_forms(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("wavelet_lm.") and hasattr(module, "in_gpu_step"):
            monkeypatch.setattr(module, "in_gpu_step", lambda x: True)


def made(keys: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    return (
        perturb(build_model(Config(**{"pkm_enabled": False, "fwpkm_enabled": False, **keys}), 20))
        .double()
        .train()
    )


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, (3, 13), generator=generator)
    return model.loss(tokens[:, :-1], tokens[:, 1:])[0]


@CONFIGS
def test_losses_and_gradients_are_those_of_every_step(keys, monkeypatch):
    model = made(dict.fromkeys(DROPOUT, 0.0) | keys)
    loss = loss_of(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    take_the_gpus_forms(monkeypatch)
    again = loss_of(model)
    torch.testing.assert_close(again, loss, rtol=1e-11, atol=1e-12)
    got = torch.autograd.grad(again, parameters, allow_unused=True)
    for one, other in zip(got, expected, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@CONFIGS
def test_gradients_with_dropout_are_those_of_differences(keys, monkeypatch):
    take_the_gpus_forms(monkeypatch)
    model = made(DROPOUT | keys)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return loss_of(model)

    grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
    grads = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
    ]
    generator = torch.Generator().manual_seed(2)
    ways = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    along = sum((g * way).sum() for g, way in zip(grads, ways, strict=True))
    step, losses = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, way in zip(parameters, ways, strict=True):
                p += sign * step * way
            losses.append(loss())
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), along, rtol=1e-5, atol=1e-7)
