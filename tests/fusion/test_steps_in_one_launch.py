"""A step of one text with all levels of a wavelet, and all memories, at once: the same function.

On a GPU, compiled, these are one launch each; here plain twins stand in for the kernels.
"""

import pytest
import torch

from tests.conftest import perturb, tiny_config
from tests.models.test_properties import V
from wavelet_lm import build_model
from wavelet_lm.fusion import fused_feedforward, fused_wavelet
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.quantization.quantize import quantize
from wavelet_lm.quantization.scheme import Scheme

TEXT = torch.randint(V, (60,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def launches(monkeypatch):
    """What was computed at once: the levels of wavelets, and how many memories were read."""
    seen = {"levels": [], "memories": []}
    lift, read_memories = (
        fused_wavelet.lifting_step_in_one,
        fused_feedforward.product_key_read_in_one,
    )

    def lifted(x, pasts, *rest):
        seen["levels"].append(len(pasts))
        return lift(x, pasts, *rest)

    def memories_read(scores, values, *rest):
        seen["memories"].append(len(values))
        return read_memories(scores, values, *rest)

    monkeypatch.setattr(fused_wavelet, "lifting_step_in_one", lifted)
    monkeypatch.setattr(fused_feedforward, "product_key_read_in_one", memories_read)
    return seen


def at_once(monkeypatch):
    for module in (fused_wavelet, fused_feedforward):
        monkeypatch.setattr(module, "steps_in_one_launch", lambda x: x.shape[:2] == (1, 1))


def decoder_of(scheme=None, **switches):
    torch.manual_seed(0)
    model = perturb(build_model(tiny_config(**switches), V)).double().eval()
    return Decoder(model if scheme is None else quantize(model, scheme), adapt=False)


def read(decoder, n=30, compiled=False):
    """The logits of n steps, [n, V], and some of them after others that were taken back."""
    session = decoder.start(decoder.prefill([TEXT[:9]])[1], max_step=3)
    step = session.decode
    if compiled:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    logits = []
    for i in range(9, 9 + n):
        logits.append(step(torch.tensor([[TEXT[i]]]))[0])
        if i % 5 == 0:
            session.decode(torch.tensor([TEXT[40:43]]))
            session.rollback(3)
    return torch.cat(logits)


SWITCHES = {
    "one layer": {"lifting_linear_only": True},
    "two layers": {"lifting_linear_only": False, "lifting_hidden_mult": 2},
    "shifts": {"wavelet_crawl": False},
    "of one block": {"shared_lifting_weights": False},
    "untied": {"untied_reconstruction": True, "lifting_linear_only": False},
    "not rotated": {"mixer_transform": "identity", "lifting_linear_only": False},
    "one level": {"levels": 1, "per_scale_mixer_widths": None},
    "one memory": {"fwpkm_enabled": False, "pkm_heads": 2},
    "memories of one shape": {"pkm_heads": 2, "fwpkm_heads": 2},
    "memories without an MLP": {"mlp_expansion": 0},
    "queries": {"pkm_num_keys": 256, "fwpkm_num_keys": 256},
}
# Of all others it is one, and the other, which has another number of heads.
MEMORIES = {"one memory": [1], "memories of one shape": [2]}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_step_at_once_is_the_same(name, monkeypatch, launches):
    decoder = decoder_of(**SWITCHES[name])
    expected = read(decoder)
    assert launches == {"levels": [], "memories": []}
    at_once(monkeypatch)
    torch.testing.assert_close(read(decoder), expected, rtol=1e-9, atol=1e-9)
    levels = SWITCHES[name].get("levels", 3)
    n = 2 * 30  # of two blocks; steps of three positions have none
    assert launches == {"levels": [levels] * n, "memories": MEMORIES.get(name, [1, 1]) * n}


def test_and_so_is_a_graph_of_it(monkeypatch):
    decoder = decoder_of(lifting_linear_only=False)
    expected = read(decoder)
    at_once(monkeypatch)
    torch.testing.assert_close(read(decoder, compiled=True), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "scheme, switches, memories",
    [
        (Scheme.uniform(8), {}, []),
        (None, {"lifting_data_dependent": 2}, [1, 1]),
        (None, {"wavelet_packets": True, "per_scale_mixer_widths": None}, [1, 1]),
    ],
)
def test_other_parts_run_step_by_step(scheme, switches, memories, monkeypatch, launches):
    decoder = decoder_of(scheme, **switches)
    at_once(monkeypatch)
    assert read(decoder, n=2).isfinite().all()
    assert launches == {"levels": [], "memories": memories * 4}
