"""Sequence classification: pooling, padding, losses, front ends."""

import math

import pytest
import torch
from torch import nn

from tests.conftest import perturb, tiny_config
from wavelet_lm.errors import UserError
from wavelet_lm.models.classifier.model import POOLING, SequenceClassifier, build_classifier

V, CLASSES = 11, 3
KINDS = {
    "wavelet_lm": {},
    "exponential mean": {"decompose_bypass_ema": True, "wavelet_packets": True},
    "multinodal": {"multinodal_enabled": True, "multinodal_cell_dim": 8, "fwpkm_heads": 1},
    "gpt": {"model": "gpt", "heads": 2},
    "wavelet_gpt": {"model": "wavelet_gpt", "heads": 2},
    "wavelet_gpt learnable": {"model": "wavelet_gpt", "heads": 2, "wavelet_module": "learnable"},
    "wavelet_gpt ema": {"model": "wavelet_gpt", "heads": 2, "wavelet_module": "ema"},
}
LENGTHS = torch.tensor([1, 32, 7, 20])


def classifier(kind: str, **options) -> SequenceClassifier:
    changes = {"per_scale_mixer_widths": None, "head_hidden": 6, **KINDS[kind]}
    return perturb(build_classifier(tiny_config(**changes), V, CLASSES, **options)).double()


@pytest.mark.parametrize("pooling", POOLING)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind, pooling):
    """Neither what it holds, bit for bit, nor whether it is there."""
    model = classifier(kind, pooling=pooling).eval()
    tokens = torch.randint(V, (4, 32))
    real = torch.arange(32) < LENGTHS[:, None]
    with torch.no_grad():
        logits = model(tokens.where(real, 0), LENGTHS)
        assert torch.equal(logits, model(tokens.where(real, torch.randint(V, (4, 32))), LENGTHS))
        for row, n, got in zip(tokens, LENGTHS, logits, strict=True):
            alone = model(row[None, :n], n[None])
            torch.testing.assert_close(got[None], alone, rtol=1e-9, atol=1e-9)


def test_pooling_equals_a_loop():
    x = torch.randn(4, 32, 5, dtype=torch.float64)
    rows = list(zip(x, LENGTHS.tolist(), strict=True))
    expected = {
        "last": [row[n - 1] for row, n in rows],
        "mean": [row[:n].mean(0) for row, n in rows],
    }
    for name, pool in POOLING.items():
        torch.testing.assert_close(pool(x, LENGTHS), torch.stack(expected[name]))


@pytest.mark.parametrize("multi_label", [False, True])
def test_losses_follow_their_formula(multi_label):
    model = classifier("gpt", multi_label=multi_label).eval()
    inputs, labels = torch.randint(V, (4, 32)), torch.tensor([2, 0, 1, 1])
    if multi_label:
        labels = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.float32)
    loss = model.loss(inputs, LENGTHS, labels).item()
    terms = []
    for logits, label in zip(model(inputs, LENGTHS).tolist(), labels.tolist(), strict=True):
        if multi_label:
            terms += [
                math.log1p(math.exp(-z if y else z)) for z, y in zip(logits, label, strict=True)
            ]
        else:
            terms.append(math.log(sum(map(math.exp, logits))) - logits[label])
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_is_trained(kind):
    """Such as none of a head over the vocabulary."""
    model = classifier(kind)
    model.loss(torch.randint(V, (4, 32)), LENGTHS, torch.tensor([2, 0, 1, 1])).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    sizes = {size for n, p in model.named_parameters() if "embedding" not in n for size in p.shape}
    assert V not in sizes


class Frames(nn.Module):
    """A vector for each 4 samples of a waveform."""

    def __init__(self, C: int):
        super().__init__()
        self.filters = nn.Conv1d(1, C, 4, stride=4, dtype=torch.float64)

    def forward(self, waveform):
        return self.filters(waveform[:, None]).transpose(1, 2)


@pytest.mark.parametrize("model", ["wavelet_lm", "gpt", "wavelet_gpt"])
def test_a_front_end_takes_the_place_of_the_embedding(model):
    config = tiny_config(model=model, head_hidden=6)
    front_end = Frames(config.C)
    heard = build_classifier(config, V, CLASSES, front_end=front_end).double()
    waveform = torch.randn(4, 128, dtype=torch.float64)
    heard.loss(waveform, LENGTHS, torch.tensor([2, 0, 1, 1])).backward()
    assert front_end.filters.weight.grad.abs().sum() > 0
    # An embedding as a front end is the embedding.
    plain = build_classifier(config, V, CLASSES).eval()
    other = build_classifier(config, V, CLASSES, front_end=nn.Embedding(V, config.C)).eval()
    other.load_state_dict(plain.state_dict())
    tokens = torch.randint(V, (4, 32))
    assert torch.equal(other(tokens, LENGTHS), plain(tokens, LENGTHS))


def test_a_front_end_cannot_stand_for_several_embeddings():
    with pytest.raises(UserError, match="multinodal_enabled"):
        classifier("multinodal", front_end=Frames(8))
