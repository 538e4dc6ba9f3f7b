"""The wavelet that a config names."""

from __future__ import annotations

from functools import partial

from torch import nn

from wavelet_lm.config import ModelConfig
from wavelet_lm.transforms.haar import HaarWavelet
from wavelet_lm.transforms.lifting import LiftingWavelet, MultiBasisWavelet
from wavelet_lm.transforms.packets import WaveletPackets
from wavelet_lm.transforms.wavelet import Wavelet


def build_wavelet(config: ModelConfig, channels: int) -> nn.Module:
    """The decomposition for signals [B, T, channels]: `decompose`, `reconstruct` and `reach`."""

    def bands(wavelet: Wavelet) -> nn.Module:
        return WaveletPackets(wavelet) if config.wavelet_packets else wavelet

    if config.wavelet_mode == "haar":
        return bands(HaarWavelet(config.levels))
    lifting = partial(
        LiftingWavelet,
        config.levels,
        channels,
        crawl=config.wavelet_crawl_k if config.wavelet_crawl else 0,
        untied=config.untied_reconstruction,
        linear=config.lifting_linear_only,
        hidden_mult=config.lifting_hidden_mult,
        dropout=config.lifting_dropout,
        rank=config.lifting_data_dependent,
        level_scaling=config.stabilized("lifting_level_scaling"),
    )
    if config.multi_basis_lifting:
        bases = [bands(lifting(init=init)) for init in config.multi_basis_inits]
        return MultiBasisWavelet(bases, config.n_scales)
    return bands(lifting(init=config.lifting_init))
