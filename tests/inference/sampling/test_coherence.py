import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wavelet_lm import UserError
from wavelet_lm.inference.sampling.coherence import WaveletCoherence, fingerprints
from wavelet_lm.transforms.haar import HaarWavelet

V, C = 9, 5
texts = st.lists(st.integers(0, V - 1), min_size=1, max_size=40)


def embedding(dtype=torch.float64):
    return torch.randn(V, C, generator=torch.Generator().manual_seed(1), dtype=dtype)


def slow_fingerprint(table, text, levels):
    """Through the transform itself."""
    bands, _ = HaarWavelet(levels).decompose(table[torch.tensor([text])])
    return bands[0].mean(1)[0]


def slow_drift(table, prompt, text, window, levels):
    a, b = (slow_fingerprint(table, part, levels) for part in (prompt, text[-window:]))
    return 1 - float(a @ b / (a @ a).sqrt() / (b @ b).sqrt())


@given(st.lists(texts, min_size=1, max_size=4), st.integers(0, 4))
def test_a_fingerprint_is_the_mean_of_the_approximation(batch, levels):
    expected = torch.stack([slow_fingerprint(embedding(), text, levels) for text in batch])
    torch.testing.assert_close(fingerprints(embedding(), batch, levels), expected)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(1, 20))
def test_drift_and_top_p_are_their_definitions(rows, window):
    prompts = [prompt for prompt, _ in rows]
    whole = [prompt + more for prompt, more in rows]
    coherence = WaveletCoherence(embedding(), prompts, 0.9, weight=0.4, window=window, levels=2)
    drifts = [slow_drift(embedding(), *row, window, 2) for row in zip(prompts, whole, strict=True)]
    assert coherence.drift(whole).tolist() == pytest.approx(drifts, abs=1e-9)
    top_p = [min(0.9, max(0.3, 0.9 - 0.4 * drift)) for drift in drifts]
    assert coherence.top_p(whole).tolist() == pytest.approx(top_p, abs=1e-9)


def test_a_prompt_that_fits_the_window_has_not_drifted():
    coherence = WaveletCoherence(embedding(torch.float32), [[1, 2, 3], [4] * 64], 0.85)
    assert coherence.top_p([[1, 2, 3], [4] * 64]).tolist() == pytest.approx([0.85, 0.85])
    assert (coherence.top_p([[1, 2, 3], [4] * 64]) <= 0.85).all()
    assert coherence.every == 16


def test_top_p_has_a_floor_and_is_never_raised():
    table = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    prompts, opposite = [[0]], [[0] + [1] * 64]
    for top_p, weight, expected in ((0.9, 0.5, 0.3), (0.9, 0.1, 0.7), (0.2, 0.5, 0.2), (1, 0, 1)):
        coherence = WaveletCoherence(table, prompts, top_p, weight)
        assert coherence.drift(opposite).tolist() == [2]
        assert coherence.top_p(opposite).tolist() == pytest.approx([expected])


def test_nothing_drifts_from_or_to_a_fingerprint_of_zeros():
    table = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    coherence = WaveletCoherence(table, [[0], [1]], 0.9, window=1)
    assert coherence.drift([[0, 1], [1, 0]]).tolist() == [0, 0]


def test_half_precision_embeddings_are_summed_in_single():
    table = embedding(torch.bfloat16)
    text = [[1, 2, 3, 4] * 50]
    assert torch.equal(fingerprints(table, text, 3), fingerprints(table.float(), text, 3))


@pytest.mark.parametrize(
    "bad", [{"weight": -0.1}, {"weight": float("nan")}, {"window": 0}, {"levels": -1}]
)
def test_options_out_of_range_name_themselves(bad):
    (name,) = bad
    with pytest.raises(UserError, match=rf"^the {name} of wavelet_coherence is [^\n]*$"):
        WaveletCoherence(embedding(), [[0]], 0.9, **bad)
