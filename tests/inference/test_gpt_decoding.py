"""A GPT behind the same doors as the main model: sessions, contexts, writers, both commands."""

import json
import random
from itertools import islice

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.cli.test_generate import error_line, text_of
from tests.conftest import perturb
from tests.inference.writers import GREEDY, LETTERS, Letters, small_writer, tokens
from tests.models.gpt.test_model import gpt_config
from tests.training.runs import assert_same_run, run_config
from tests.training.test_resume import killed_run
from wavelet_lm import UserError, build_model, generate
from wavelet_lm.evaluation.likelihood import evaluate_run
from wavelet_lm.fusion.fuse import fuse, weight_bytes_per_token
from wavelet_lm.inference.completion import Request, Strategy
from wavelet_lm.inference.context import apply_context
from wavelet_lm.inference.decoder import Decoder, StaticSession
from wavelet_lm.inference.generation import sampled_tokens
from wavelet_lm.inference.sampling.logits import SamplingOptions
from wavelet_lm.quantization.quantize import quantize
from wavelet_lm.quantization.scheme import Scheme
from wavelet_lm.training.run import resume, train

V, CONTEXT = len(LETTERS), 32
KINDS = ("gpt", "haar", "learnable", "ema")
TEXT = torch.randint(V, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def small_gpt(kind="gpt", seed=0, **overrides):
    torch.manual_seed(seed)
    model = perturb(build_model(gpt_config(kind, **overrides), V), seed=seed).double().eval()
    with torch.no_grad():  # an untrained model's logits are too flat to tell texts apart
        model.head.weight.mul_(20)
    return model


# --- sessions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_reads_as_the_model_does_and_takes_back(kind):
    """Rows of different lengths, steps of any size, some of their tokens forgotten again."""
    model = small_gpt(kind)
    expected, _ = model(TEXT)
    decoder = Decoder(model)
    at = [5, 9]
    _, state = decoder.prefill([TEXT[i, :n].tolist() for i, n in enumerate(at)])
    session = decoder.start(state, max_step=3)
    assert isinstance(session, StaticSession)
    sizes = random.Random(kind)
    while max(at) < CONTEXT:
        T = sizes.randint(1, min(3, CONTEXT - max(at)))
        logits = session.decode(torch.stack([TEXT[i, n : n + T] for i, n in enumerate(at)]))
        for i, n in enumerate(at):
            torch.testing.assert_close(logits[i], expected[i, n : n + T], **CLOSE)
        back = sizes.randint(0, T - 1)
        session.rollback(back)
        at = [n + T - back for n in at]
    _, state = decoder.prefill([TEXT[i, :n].tolist() for i, n in enumerate(at)])
    for a, b in zip(tree_leaves(session.state()), tree_leaves(state), strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_goes_on_from_another_state(kind):
    model = small_gpt(kind)
    decoder = Decoder(model)
    session = decoder.start(decoder.prefill([[1, 2, 3], [4, 5, 6]])[1])
    session.decode(torch.tensor([[7], [8]]))
    _, other = decoder.prefill([TEXT[0, :9].tolist()])
    session.load(other, [0, 0])
    logits = session.decode(TEXT[:1, 9:10].expand(2, 1))
    torch.testing.assert_close(logits, model(TEXT[:1, :10])[0][:, -1:].expand(2, 1, V), **CLOSE)


@pytest.mark.parametrize("kind", ["gpt", "learnable"])
def test_a_step_is_one_graph_and_changes_its_buffers_alone(kind):
    model = small_gpt(kind)
    decoder = Decoder(model)
    session = decoder.start(decoder.prefill([TEXT[0, :9].tolist()])[1])
    token, logits = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, V, dtype=torch.float64)
    torch.compiler.reset()
    step = torch.compile(
        lambda: logits.copy_(session.decode(token)[:, -1]), fullgraph=True, backend="eager"
    )
    buffers = [buffer.data_ptr() for buffer in session.buffers()]
    for t in range(9, 14):
        token.copy_(TEXT[:1, t : t + 1])
        step()
        torch.testing.assert_close(logits, model(TEXT[:1, : t + 1])[0][:, -1], **CLOSE)
    assert buffers == [buffer.data_ptr() for buffer in session.buffers()]
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_it_reads_nearly_the_same(kind):
    model = small_gpt(kind).float()
    decoder = Decoder(model, dtype=torch.bfloat16)
    _, state = decoder.prefill([TEXT[0, :20].tolist()])
    logits = decoder.start(state).decode(TEXT[:1, 20:21])[0, -1]
    expected = model(TEXT[:1, :21])[0][0, -1]
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * (expected.max() - expected.min())


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_that_a_token_reads(tied):
    """All but the rows of the tables that it does not look up."""
    head = {"tie_embedding_to_lm_head": True, "head_hidden": 0} if tied else {}
    fused = fuse(small_gpt("learnable", **head))
    size = sum(p.numel() for p in small_gpt("learnable", **head).parameters())
    unread = (CONTEXT - 1) * 16 + (0 if tied else V - 1) * 16
    assert weight_bytes_per_token(fused) == 8 * (size - unread + (16 if tied else 0))


@pytest.mark.parametrize("kind", KINDS)
def test_with_8_bit_weights_it_reads_nearly_the_same(kind):
    model = small_gpt(kind, C=64).float()
    decoder = Decoder(quantize(model, Scheme.uniform(8)))
    _, state = decoder.prefill([TEXT[0, :20].tolist()])
    logits = decoder.start(state).decode(TEXT[:1, 20:21])[0, -1]
    expected = model(TEXT[:1, :21])[0][0, -1]
    assert (logits - expected).abs().max() < 0.05 * (expected.max() - expected.min())
    assert decoder.weight_bytes_per_token() < 0.4 * Decoder(model).weight_bytes_per_token()


# --- contexts and their end ----------------------------------------------------------------------


def test_contexts():
    model = small_gpt()
    assert apply_context(fuse(model), "auto").config.model == "gpt"
    for context, message in (
        ("window:8", r"limits the running mean and this model has none; use stream"),
        ("recompute:33", r"longer than the 32 positions of this model .* recompute:32 or less"),
    ):
        with pytest.raises(UserError, match=message):
            Decoder(model, context=context)


def test_recomputation_goes_on_past_the_context():
    model = small_gpt()
    decoder = Decoder(model, context="recompute:32")
    start = decoder.prefill([TEXT[0].tolist()])
    options = SamplingOptions(temperature=0)
    steps = sampled_tokens(decoder, *start, [TEXT[0].tolist()], options, [1])
    text = TEXT[0].tolist()
    for (drawn,) in islice(steps, 5):
        assert drawn.token == int(model(torch.tensor([text[-32:]]))[0][0, -1].argmax())
        text.append(drawn.token)


def test_a_session_refuses_to_go_past_the_context():
    decoder = Decoder(small_gpt())
    session = decoder.start(decoder.prefill([TEXT[0].tolist()])[1])
    with pytest.raises(UserError, match=r"a text of 33 tokens is too long for this GPT"):
        session.decode(TEXT[:1, :1])
    with pytest.raises(UserError, match=r"a text of 33 tokens"):
        decoder.prefill([[1]], session.state())


@pytest.mark.parametrize(
    ("strategy", "drafted"),
    [
        (GREEDY, False),
        (GREEDY, True),
        (Strategy(SamplingOptions(), best_of_n=3), False),
        (Strategy(SamplingOptions(temperature=0), lookahead_k=2, lookahead_depth=3), False),
    ],
    ids=["plain", "with a draft", "best of n", "lookahead"],
)
def test_texts_fill_the_context_and_go_no_further(strategy, drafted):
    draft = small_gpt("haar", seed=2) if drafted else None
    writer = small_writer(strategy, model=small_gpt("haar"), draft=draft)
    reading = writer.read([tokens("abc"), tokens("abcdefg")])
    room = CONTEXT - strategy.lookahead_depth + 1
    done = writer.write(reading, [Request(1, room - 3), Request(2, 4)])
    assert [len(completion.tokens) for completion in done] == [room - 3, 4]
    alone = small_writer(strategy, model=small_gpt("haar"))
    (expected,) = alone.write(alone.read([tokens("abc")]), [Request(1, room - 3)])
    assert done[0].tokens == expected.tokens
    with pytest.raises(UserError, match=r"a text of 33 tokens .* --context recompute:32"):
        writer.write(reading, [Request(1, 4), Request(2, room - 6)])


def test_generate_says_beforehand_that_it_would_be_too_long():
    with pytest.raises(UserError, match=r"a text of 40 tokens"):
        generate(small_gpt(), Letters(), "a", num_tokens=40)


def test_a_saved_text_goes_on(tmp_path):
    writer = small_writer(GREEDY, model=small_gpt("ema"))
    reading = writer.read([tokens("abc def.")])
    writer.save(tmp_path / "text.state", reading)
    again = writer.load(tmp_path / "text.state")
    (a,), (b,) = (writer.write(r, [Request(1, 9)]) for r in (reading, again))
    assert a.tokens == b.tokens


# --- the commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt", "learnable"])
def test_training_resuming_evaluating_and_generating(kind, tmp_path, monkeypatch):
    named = {"model": "gpt"} if kind == "gpt" else {"model": "wavelet_gpt", "wavelet_module": kind}
    values = {**named, "heads": 2, "head_hidden": 8, "optimizer": "Muon", "max_steps": 30}
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    run = train(run_config(folders[0], **values)).path
    assert_same_run(run, resume(killed_run(folders[1], monkeypatch, step=17, **values)).path)
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    valid = [row["val_loss"] for row in lines if row["event"] == "eval"]
    assert valid[-1] < valid[0]
    assert f"{named['model']}, C 16" in (folders[0] / "runs.md").read_text(encoding="utf-8")
    results = evaluate_run(run, device="cpu", log=lambda line: None)
    assert results["sliding"]["nll"] == pytest.approx(valid[-1], rel=0.2)

    prompt = ("--checkpoint", run, "--prompt", "a")
    assert len(text_of(*prompt, "--num_tokens", 16)) == len("a") + 16 + 1
    line = error_line(*prompt, "--num_tokens", 17)
    assert "a text of 17 tokens is too long for this GPT, which reads 16" in line
    longer = text_of(*prompt, "--num_tokens", 20, "--context", "recompute:16")
    assert len(longer) == len("a") + 20 + 1
    assert "recompute:16 or less" in error_line(*prompt, "--context", "recompute:17")
    assert "memory that this model lacks" in error_line(*prompt, "--fwpkm_inference_updates")
