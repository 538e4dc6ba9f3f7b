"""Names, lags and reaches of bands, against what a wavelet does."""

import pytest
import torch

from tests.conftest import perturb, tiny_config
from wavelet_lm.models.wavelet_lm.wavelets import build_wavelet
from wavelet_lm.scope.bands import bands_of, mixtures_of

KINDS = {
    "crawl": {},
    "shift": {"wavelet_crawl": False},
    "haar": {"wavelet_mode": "haar", "wavelet_crawl": False},
    "packets": {"wavelet_packets": True},
    "bases": {"multi_basis_lifting": True, "shared_lifting_weights": False},
    "packets of bases": {
        "multi_basis_lifting": True,
        "shared_lifting_weights": False,
        "wavelet_packets": True,
    },
}


def wavelet_of(kind):
    wide = {} if "packets" not in kind else {"per_scale_mixer_widths": None}
    return perturb(build_wavelet(tiny_config(**KINDS[kind], **wide), 4)).double()


@pytest.mark.parametrize("kind", KINDS)
def test_a_band_sees_as_far_back_as_its_reach_and_no_farther(kind):
    wavelet = wavelet_of(kind)
    x = torch.randn(1, 60, 4, dtype=torch.float64)
    changed = x.clone()
    changed[:, 20] += 1
    with torch.no_grad():
        before, after = wavelet.decompose(x)[0], wavelet.decompose(changed)[0]
    bands = bands_of(wavelet)
    assert len(bands) == len(before)
    for band, a, b in zip(bands, before, after, strict=True):
        seen = (a - b).abs().sum(-1)[0].nonzero().flatten().tolist()
        assert (seen[0], seen[-1]) == (20, 20 + band.reach), band


def test_names_and_lags_are_those_of_the_levels():
    wavelet = wavelet_of("crawl")
    with torch.no_grad():
        wavelet.delays[1].logits.copy_(torch.tensor([0.0, 0.0, 1.0]).log())  # lag 3 alone
    bands = bands_of(wavelet)
    assert [band.name for band in bands] == ["a", "d2", "d1", "d0"]
    assert bands[0].lags == ()
    assert bands[2].lags == pytest.approx((3.0,))
    second = next(mixture for mixture in mixtures_of(wavelet) if mixture.level == 1)
    assert second.lags == (1, 2, 3)
    assert second.weights == pytest.approx((0, 0, 1))


def test_a_packet_is_named_by_the_way_to_it():
    bands = bands_of(wavelet_of("packets"))
    assert [band.name for band in bands[:4]] == ["aaa", "aad", "ada", "add"]
    assert len(bands[0].lags) == 0
    assert len(bands[7].lags) == 3
    # Constant signals are what the first band keeps, and what every difference of lags loses.
    haar = build_wavelet(
        tiny_config(
            wavelet_mode="haar",
            wavelet_crawl=False,
            wavelet_packets=True,
            per_scale_mixer_widths=None,
        ),
        4,
    )
    bands, _ = haar.decompose(torch.ones(1, 40, 4))
    kept = [band[:, 10:].abs().sum() > 1e-5 for band in bands]
    assert kept == [not band.lags for band in bands_of(haar)]


def test_several_bases_are_averaged_by_their_weights():
    wavelet = wavelet_of("bases")
    with torch.no_grad():
        wavelet.weights.copy_(torch.tensor([[0.5], [0.5]]).log().expand_as(wavelet.weights))
    one, other = (bands_of(basis)[-1].lags[0] for basis in wavelet.bases)
    assert bands_of(wavelet)[-1].lags[0] == pytest.approx((one + other) / 2)
    assert {mixture.basis for mixture in mixtures_of(wavelet)} == {0, 1}
