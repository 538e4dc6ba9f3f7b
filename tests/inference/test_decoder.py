"""Sessions read as the model does: any step sizes, rollbacks, forks, batches and contexts."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from tests.conftest import perturb, tiny_config
from tests.models.test_properties import V, configs
from wavelet_lm import UserError, build_model
from wavelet_lm.inference import decoder as decoder_module
from wavelet_lm.inference.decoder import Decoder, FunctionalSession, StaticSession
from wavelet_lm.inference.generation import sampled_tokens
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.models.wavelet_lm.memory import resting

RANDOM = {"max_examples": 25, "suppress_health_check": list(HealthCheck), "derandomize": True}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def random_model(config=None):
    """A perturbed model in float64 and eval mode."""
    torch.manual_seed(0)
    return perturb(build_model(config or tiny_config(), V)).double().eval()


def adapts(config):
    return config.fwpkm_inference_updates


def whole(model, text):
    """Logits of every position from one call."""
    with torch.no_grad():
        return model(torch.tensor([text]))[0][0]


TEXT = torch.randint(V, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@settings(**RANDOM)
@given(configs(), st.lists(st.integers(1, 4), min_size=3, max_size=6))
def test_a_session_reads_as_the_model_does_in_steps_of_any_size(config, steps):
    model = random_model(config)
    decoder = Decoder(model, adapt=False)
    expected = whole(model, TEXT)
    logits, state = decoder.prefill([TEXT[:9]])
    torch.testing.assert_close(logits[0], expected[8], **CLOSE)
    session, at = decoder.start(state, max_step=4), 9
    assert isinstance(session, StaticSession)
    for T in steps:
        read = session.decode(torch.tensor([TEXT[at : at + T]]))
        torch.testing.assert_close(read[0], expected[at : at + T], **CLOSE)
        at += T


@settings(**RANDOM)
@given(configs(), st.data())
def test_what_is_rolled_back_was_never_read(config, data):
    model = random_model(config)
    decoder = Decoder(model, adapt=False)
    session = decoder.start(decoder.prefill([TEXT[:5]])[1], max_step=4)
    read = list(TEXT[:5])
    for _ in range(5):
        tokens = data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=4))
        back = data.draw(st.integers(0, len(tokens)))
        logits = session.decode(torch.tensor([tokens]))
        torch.testing.assert_close(logits[0], whole(model, read + tokens)[len(read) :], **CLOSE)
        session.rollback(back)
        read += tokens[: len(tokens) - back]
    _, expected = decoder.prefill([read])
    assert_same_state(session.state(), expected)


def assert_same_state(a, b):
    a, b = ([leaf for leaf in tree_leaves(s) if leaf is not None] for s in (a, b))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


@settings(**RANDOM)
@given(configs(), st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_texts_of_any_lengths_in_a_batch_are_read_as_alone(config, lengths):
    model = random_model(config)
    decoder = Decoder(model)
    texts = [TEXT[i : i + n] for i, n in enumerate(lengths)]
    logits, state = decoder.prefill(texts)
    session = decoder.start(state)
    following = torch.tensor(TEXT[20 : 20 + len(texts)])[:, None]
    after = session.decode(following)
    for row, text in enumerate(texts):
        alone, alone_state = decoder.prefill([text])
        torch.testing.assert_close(logits[row], alone[0], **CLOSE)
        assert_same_state(decoder.rows(state, [row]), alone_state)
        one = decoder.start(alone_state).decode(following[row : row + 1])
        torch.testing.assert_close(after[row], one[0], **CLOSE)


@settings(**RANDOM)
@given(configs())
def test_a_session_starts_anew_from_rows_of_another_state(config):
    model = random_model(config)
    decoder = Decoder(model, adapt=False)
    _, state = decoder.prefill([TEXT[:6], TEXT[3:17], TEXT[5:8]])
    session = decoder.start(decoder.rows(state, [0, 0, 0, 0]))
    session.decode(torch.tensor([[1], [2], [3], [4]]))
    session.load(state, [2, 1, 1, 0])
    assert_same_state(session.state(), decoder.rows(state, [2, 1, 1, 0]))
    logits = session.decode(torch.tensor([[1], [2], [3], [4]]))
    texts = [[*TEXT[5:8], 1], [*TEXT[3:17], 2], [*TEXT[3:17], 3], [*TEXT[:6], 4]]
    torch.testing.assert_close(logits[:, 0], decoder.prefill(texts)[0], **CLOSE)


def test_neither_reading_nor_decoding_changes_a_state():
    decoder = Decoder(random_model())
    _, state = decoder.prefill([TEXT[:6]])
    copies = [leaf.clone() for leaf in tree_leaves(state) if leaf is not None]
    session = decoder.start(state)
    snapshot = session.state()
    for token in TEXT[:20]:
        session.decode(torch.tensor([[token]]))
    decoder.prefill([TEXT[:3]], state)
    assert_same_state(state, copies)
    assert_same_state(snapshot, copies)


def test_the_buffers_stay_where_they_are():
    decoder = Decoder(random_model())
    session = decoder.start(decoder.prefill([TEXT[:6]])[1])
    places = [buffer.data_ptr() for buffer in session.buffers()]
    for token in TEXT:
        session.decode(torch.tensor([[token]]))
    assert [buffer.data_ptr() for buffer in session.buffers()] == places


def test_a_long_prompt_is_read_in_bounded_chunks(monkeypatch):
    decoder, lengths = Decoder(random_model()), []
    expected = decoder.prefill([TEXT, TEXT[:30]])
    monkeypatch.setattr(decoder_module, "PREFILL_POSITIONS", 16)
    read = decoder.read

    def counting(idx, state, last_only):
        lengths.append(idx.shape)
        return read(idx, state, last_only)

    monkeypatch.setattr(decoder, "read", counting)
    logits, state = decoder.prefill([TEXT, TEXT[:30]])
    assert [tuple(shape) for shape in lengths] == [(1, 16), (1, 16), (1, 8), (1, 16), (1, 14)]
    torch.testing.assert_close(logits, expected[0], **CLOSE)
    assert_same_state(state, expected[1])


# --- contexts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 5, 16, 100])
def test_a_window_limits_the_running_mean_alone(N, monkeypatch):
    """Against a model whose running mean is taken anew from the last N inputs."""
    from wavelet_lm.models.wavelet_lm import block as block_module

    def slow_mean(x, state=None):
        means = [x[:, max(0, t - N + 1) : t + 1].mean(1) for t in range(x.shape[1])]
        return torch.stack(means, 1), None

    model = random_model()
    decoder = Decoder(model, context=f"window:{N}")
    with monkeypatch.context() as patch:
        for block in model.blocks:
            patch.setattr(block.bypass, "average", slow_mean)
        expected = whole(model, TEXT)
    assert block_module.running_mean is model.blocks[0].bypass.average
    logits, state = decoder.prefill([TEXT[:11]])
    torch.testing.assert_close(logits[0], expected[10], **CLOSE)
    session, at = decoder.start(state, max_step=3), 11
    for T in (1, 3, 2, 1, 3, 3, 3, 1):
        read = session.decode(torch.tensor([TEXT[at : at + T]]))
        torch.testing.assert_close(read[0], expected[at : at + T], **CLOSE)
        session.rollback(T)
        session.decode(torch.tensor([TEXT[at : at + T]]))
        at += T
    assert_same_state(session.state(), decoder.prefill([TEXT[:at]])[1])


@pytest.mark.parametrize("N", [1, 7, 100])
def test_recomputing_reads_the_last_tokens_alone(N):
    model = random_model()
    decoder = Decoder(model, context=f"recompute:{N}")
    texts = [TEXT[:4], TEXT[10:22]]
    logits, state = decoder.prefill(texts)
    session = decoder.start(state, max_step=2)
    assert isinstance(session, FunctionalSession)
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row], whole(model, text[-N:])[-1], **CLOSE)
    after = session.decode(torch.tensor([[1, 2], [3, 4]]))
    for row, text in enumerate([[*texts[0], 1, 2], [*texts[1], 3, 4]]):
        torch.testing.assert_close(after[row, 0], whole(model, text[:-1][-N:])[-1], **CLOSE)
        torch.testing.assert_close(after[row, 1], whole(model, text[-N:])[-1], **CLOSE)
    session.rollback(1)
    again = session.decode(torch.tensor([[2], [4]]))
    torch.testing.assert_close(again[:, 0], after[:, 1], **CLOSE)


@pytest.mark.parametrize("context", ["window", "window:0", "window:-3", "recompute:x", "all", ""])
def test_a_context_that_is_none_is_one_line(context):
    with pytest.raises(UserError, match=r"^context is .*auto, stream, window:N or recompute:N$"):
        Decoder(random_model(), context=context)


def test_auto_is_a_window_of_block_size_where_there_is_a_running_mean():
    for switches, same in (
        ({}, "window:8"),
        ({"decompose_bypass": False}, "stream"),
        ({"decompose_bypass_ema": True}, "stream"),
    ):
        model = random_model(tiny_config(block_size=8, **switches))
        auto, expected = (Decoder(model, context=c).prefill([TEXT])[0] for c in ("auto", same))
        assert torch.equal(auto, expected)


def test_a_window_of_no_mean_is_refused():
    for switches in ({"decompose_bypass": False}, {"decompose_bypass_ema": True}):
        with pytest.raises(UserError, match="has none; use stream"):
            Decoder(random_model(tiny_config(**switches)), context="window:8")


# --- fast weights --------------------------------------------------------------------------------

LEARNING = {"fwpkm_inference_updates": True, "fwpkm_chunk_size": 4, "fwpkm_update_lr": 30.0}


def test_fast_weights_learn_from_what_is_decoded_and_not_from_prompts():
    model = random_model(tiny_config(**LEARNING))
    decoder = Decoder(model)
    _, state = decoder.prefill([TEXT[:20]])
    learned = decoder.start(state)
    for token in TEXT[20:31]:
        learned.decode(torch.tensor([[token]]))
    after = learned.state()
    assert after[0].memory.rows.shape[1] > 0
    # A prompt that continues the text reads with the deltas and leaves them alone …
    logits, prompted = decoder.prefill([TEXT[31:40]], after)
    assert torch.equal(prompted[0].memory.deltas, after[0].memory.deltas)
    # … as decoding with a chunk that never ends would.
    reading = Decoder(model)
    reading.adapts = False
    session = reading.start(resting(after))
    for token in TEXT[31:40]:
        read = session.decode(torch.tensor([[token]]))
    torch.testing.assert_close(logits, read[:, 0], **CLOSE)
    assert not torch.allclose(logits, Decoder(model, adapt=False).prefill([TEXT[:40]])[0])
    # And it learns again when decoding goes on.
    again = decoder.start(prompted)
    for token in TEXT[:4]:
        again.decode(torch.tensor([[token]]))
    assert not torch.equal(again.state()[0].memory.deltas, after[0].memory.deltas)


def test_fast_weights_of_a_batch_are_those_of_its_rows():
    decoder = Decoder(random_model(tiny_config(**LEARNING)))
    texts = [TEXT[:4], TEXT[7:12]]
    session = decoder.start(decoder.prefill(texts)[1])
    alone = [decoder.start(decoder.prefill([text])[1]) for text in texts]
    for a, b in zip(TEXT[:14], TEXT[14:28], strict=True):
        together = session.decode(torch.tensor([[a], [b]]))
        for row, (one, token) in enumerate(zip(alone, (a, b), strict=True)):
            expected = one.decode(torch.tensor([[token]]))[0]
            torch.testing.assert_close(together[row], expected, **CLOSE)


def test_fast_weights_that_learn_cannot_be_taken_back_or_compiled():
    model = random_model(tiny_config(**LEARNING))
    decoder = Decoder(model)
    with pytest.raises(UserError, match="taken back"):
        decoder.start(decoder.prefill([[1]])[1], max_step=2)
    with pytest.raises(UserError, match="fwpkm_inference_updates"):
        Decoder(model, compile=True)
    with pytest.raises(UserError, match="fwpkm_inference_updates"):
        Decoder(model, context="recompute:8")


# --- compiled and captured steps -----------------------------------------------------------------

SAMPLED = SamplingOptions(temperature=1.1, top_k=6, top_p=0.9, repetition_penalty=1.2)
PROMPTS, SEEDS = [[1, 2, 3], [4, 5]], [3, 8]


def drawn_tokens(decoder, options, n=20):
    logits, state = decoder.prefill(PROMPTS)
    steps = sampled_tokens(decoder, logits, state, PROMPTS, options, SEEDS)
    return [[drawn.token for drawn in step] for step in itertools.islice(steps, n)]


def test_a_whole_step_is_one_graph_for_the_compiler():
    """Traced by dynamo, with the state written in place, and run without a code generator."""
    model = random_model(tiny_config(layers=1, levels=2, per_scale_mixer_widths=None)).float()
    eager, traced = Decoder(model), Decoder(model)
    traced.accelerate = lambda step, owners: torch.compile(step, fullgraph=True, backend="eager")
    assert drawn_tokens(traced, SAMPLED, 8) == drawn_tokens(eager, SAMPLED, 8)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("options", [SamplingOptions(temperature=0), SAMPLED])
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"wavelet_crawl_k": 9, "decompose_bypass_ema": True},
        {"delta_memory": True, "lifting_linear_only": True, "mixer_transform": "identity"},
        {"wavelet_packets": True, "levels": 2, "per_scale_mixer_widths": None, "mixer_depth": 2},
    ],
)
def test_compiled_text_is_that_of_the_plain_decoder(switches, options):
    model = random_model(tiny_config(**switches)).float()
    compiled = drawn_tokens(Decoder(model, compile=True), options)
    assert compiled == drawn_tokens(Decoder(model), options)
    torch.compiler.reset()


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [SamplingOptions(temperature=0), SAMPLED])
def test_a_captured_step_is_the_step(compile, options):
    model = random_model().cuda()
    captured = Decoder(model, compile=compile)
    plain = Decoder(model)
    plain.accelerate = lambda step, owners: step
    tokens = drawn_tokens(captured, options)
    assert tokens == drawn_tokens(plain, options) == drawn_tokens(captured, options)
    assert tokens == drawn_tokens(Decoder(model.cpu()), options)


@pytest.mark.cuda
def test_bfloat16_on_the_gpu_agrees_within_rounding():
    model = random_model().float().cuda()
    exact, _ = Decoder(model).prefill(PROMPTS)
    half, _ = Decoder(model, dtype=torch.bfloat16).prefill(PROMPTS)
    assert (half - exact).abs().max() <= 0.05 * (exact.max() - exact.min())
