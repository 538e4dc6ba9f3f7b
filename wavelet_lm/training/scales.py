"""What a model has learned of time: the weight of each scale, and the lags of its delays."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.func import functional_call

from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.wavelet_lm.model import WaveletLM
from wavelet_lm.scope.bands import bands_of
from wavelet_lm.training.weights import Weights

# Weights of which `scales_of` tells, all of a few numbers.
READ = re.compile(r"(^|\.)(blocks\.\d+\.scale_weights|wavelets\.\d+\.(.*\.)?(logits|weights))$")


def scales_of(model: nn.Module, weights: Weights) -> list[dict[str, Any]]:
    """The blocks of a model, each with names, weights and lags (in tokens) of its scales.

    Empty where a model has no wavelet blocks. For all processes; JSON-ready.

    Args:
        weights: those of the model, which may be shares of them.
    """
    networks = model.networks() if isinstance(model, LanguageModel) else []
    if not networks or not all(isinstance(network, WaveletLM) for network in networks):
        return []
    reader = _Reader(networks)
    if weights.are_whole:
        return reader()
    known = {name: p for name, p in model.named_parameters() if READ.search(name)}
    whole = {id(known[name]): value for name, value in weights.whole(known).items()}
    own = reader.named_parameters()
    return functional_call(reader, {name: whole[id(p)] for name, p in own if id(p) in whole}, ())


class _Reader(nn.Module):
    def __init__(self, networks: list[WaveletLM]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self) -> list[dict[str, Any]]:
        return [
            _block(network, n, f"model {m + 1}, " if len(self.networks) > 1 else "")
            for m, network in enumerate(self.networks)
            for n in range(len(network.blocks))
        ]


def _block(network: WaveletLM, n: int, prefix: str) -> dict[str, Any]:
    bands = bands_of(network.wavelets[n % len(network.wavelets)])
    return {
        "name": f"{prefix}block {n + 1}",
        "scales": [band.name for band in bands],
        "weights": network.blocks[n].scale_weights.detach().float().tolist(),
        "lags": [list(band.lags) for band in bands],
    }
