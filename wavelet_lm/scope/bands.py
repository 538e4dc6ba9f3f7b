"""The bands of a wavelet by name, with the lags that it has learned and how far back they see."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import nn

from wavelet_lm.transforms.delays import CausalFilter, Shift
from wavelet_lm.transforms.lifting import MultiBasisWavelet
from wavelet_lm.transforms.packets import WaveletPackets
from wavelet_lm.transforms.wavelet import Wavelet


class Band(NamedTuple):
    """One scale.

    name: `a` the approximation, `d0` the finest detail; of a packet a letter a level, the first
    level first; lags: in tokens, of the differences that the band takes, one a level where it takes
    one (the mean of the learned mixture); reach: how many tokens back it sees.
    """

    name: str
    lags: tuple[float, ...]
    reach: int


class Mixture(NamedTuple):
    """What delays level k: `weights`, which sum to 1, over `lags` in tokens; `basis` of several."""

    basis: int
    level: int
    lags: tuple[int, ...]
    weights: tuple[float, ...]


def mixtures_of(wavelet: nn.Module) -> list[Mixture]:
    """The delay of every level, of every basis."""
    return [
        Mixture(b, k, *_mixture(delay))
        for b, basis in enumerate(_bases(wavelet))
        for k, delay in enumerate(basis.delays)
    ]


def bands_of(wavelet: nn.Module) -> list[Band]:
    """The scales, coarse to fine as `decompose` gives them.

    Of several bases side by side the lags are the mean over the bases, by their weights in the
    band, and the reach is that of the farthest.
    """
    bases = [_bands(basis, _is_packets(wavelet)) for basis in _bases(wavelet)]
    if not isinstance(wavelet, MultiBasisWavelet):
        return bases[0]
    shares = wavelet.weights.detach().float().softmax(0).T.tolist()
    return [
        Band(
            same[0].name,
            tuple(
                sum(w * lag for w, lag in zip(of_bases, lags, strict=True))
                for lags in zip(*(band.lags for band in same), strict=True)
            ),
            max(band.reach for band in same),
        )
        for of_bases, same in zip(shares, zip(*bases, strict=True), strict=True)
    ]


def _bands(wavelet: Wavelet, packets: bool) -> list[Band]:
    mixtures = [_mixture(delay) for delay in wavelet.delays]
    lags = [sum(w * lag for lag, w in zip(*m, strict=True)) for m in mixtures]
    L = wavelet.levels
    if packets:  # the digits of a band's number, from the highest, are the levels from the first
        paths = [[n >> (L - 1 - k) & 1 for k in range(L)] for n in range(2**L)]
        return [
            Band(
                "".join("ad"[digit] for digit in path),
                tuple(lag for lag, digit in zip(lags, path, strict=True) if digit),
                wavelet.reach,
            )
            for path in paths
        ]
    reaches = list(accumulate(delay.max_lag for delay in wavelet.delays))
    details = [Band(f"d{k}", (lags[k],), reaches[k]) for k in reversed(range(L))]
    return [Band("a", (), wavelet.reach), *details]


def _mixture(delay: nn.Module) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if isinstance(delay, Shift):
        return (delay.max_lag,), (1.0,)
    assert isinstance(delay, CausalFilter)
    return tuple(range(delay.min_lag, delay.max_lag + 1)), tuple(delay.taps().tolist())


def _is_packets(wavelet: nn.Module) -> bool:
    first = wavelet.bases[0] if isinstance(wavelet, MultiBasisWavelet) else wavelet
    return isinstance(first, WaveletPackets)


def _bases(wavelet: nn.Module) -> Sequence[Wavelet]:
    bases = wavelet.bases if isinstance(wavelet, MultiBasisWavelet) else [wavelet]
    return [basis.wavelet if isinstance(basis, WaveletPackets) else basis for basis in bases]
