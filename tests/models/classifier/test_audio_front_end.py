"""The filter bank against a slow loop, and in front of every model of the family."""

import pytest
import torch

from wavelet_lm.config import Config
from wavelet_lm.models.classifier.audio_front_end import AudioFrontEnd
from wavelet_lm.models.classifier.model import build_classifier
from wavelet_lm.models.registry import MODELS


def slow(front_end, waveform):
    weight, bias = front_end.filters.weight[:, 0], front_end.filters.bias
    size = weight.shape[1]
    vectors = []
    for start in range(0, len(waveform) - front_end.patch + 1, front_end.patch):
        patch = waveform[start : start + front_end.patch]
        windows = [patch[i : i + size] for i in range(front_end.patch - size + 1)]
        responses = torch.stack([weight @ window + bias for window in windows])
        vectors.append(front_end.project(responses.max(dim=0).values))
    return torch.stack(vectors)


def test_against_a_slow_loop():
    front_end = AudioFrontEnd(6, n_filters=5, length=4, patch=10)
    waveforms = torch.randn(2, 37)
    expected = torch.stack([slow(front_end, waveform) for waveform in waveforms])
    assert expected.shape == (2, 3, 6)
    torch.testing.assert_close(front_end(waveforms), expected)
    full = AudioFrontEnd(64)
    assert full(torch.randn(1, 16000)).shape == (1, 40, 64)
    assert full.filters.weight.shape == (128, 1, 200)


@pytest.mark.parametrize("model", MODELS)
def test_a_classifier_of_sound_reads_real_patches_alone(model):
    config = Config(
        model=model, C=16, layers=2, levels=2, per_scale_mixer_widths=None, block_size=4
    )
    config = config.replace(pkm_enabled=False, fwpkm_enabled=False, head_hidden=8)
    classifier = build_classifier(
        config, 1, 3, multi_label=True, front_end=AudioFrontEnd(16, 8, 20, 50)
    ).eval()
    sounds = torch.randn(2, 200)
    lengths = torch.tensor([4, 2])
    logits = classifier(sounds, lengths)
    assert logits.shape == (2, 3)
    sounds[1, 100:] = 0
    torch.testing.assert_close(classifier(sounds, lengths), logits)
    classifier.loss(sounds, lengths, torch.eye(3)[:2]).backward()
    assert classifier.backbone.embedding.filters.weight.grad.abs().sum() > 0
