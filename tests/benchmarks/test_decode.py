"""The decoding benchmark, at a size where it says nothing about speed."""

import json
import sys

import decode
import pytest
import report
import torch
from equal_gpt import EqualGPT, gpt_n_params, gpt_shape
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import TINY, tiny_config
from wavelet_lm import build_model
from wavelet_lm.errors import UserError

VOCAB = 50
SHORT = ["--positions", "8,24", "--batches", "1,3", "--recompute", "8"]
SHORT += ["--tokens", "2", "--repeats", "2"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command on a tiny config: the results that it wrote."""
    config, results = tmp_path / "tiny.json", tmp_path / "results.json"
    config.write_text(json.dumps(TINY))
    monkeypatch.setattr(report, "BANDWIDTH_BYTES", {"cpu": 4096, "cuda": 4096})

    def run(*more):
        arguments = ["--config", config, "--vocab", VOCAB, "--device", "cpu", *SHORT, *more]
        monkeypatch.setattr(
            sys, "argv", ["decode.py", *map(str, arguments), "--json", str(results)]
        )
        decode.main()
        return json.loads(results.read_text())

    return run


def places(results, part, method):
    key = {"position": "position", "batch": "batch"}[part]
    return [r[key] for r in results["rows"] if (r["part"], r["method"]) == (part, method)]


def test_every_method_is_measured_everywhere(run, capsys):
    results = run("--no_gpt")
    for method in ("streaming", "recompute:8"):
        assert places(results, "position", method) == [8, 24]
        assert places(results, "batch", method) == [1, 3]
    assert places(results, "position", "gpt") == []
    for row in results["rows"]:
        n = {"streaming": 2, "recompute:8": 1}[row["method"]]
        assert row["timed_steps"] == n * 2
        speed = row["batch"] / row["milliseconds"] * 1000
        assert row["tokens_per_second"] == pytest.approx(speed)
    assert results["check"]["greedy_tokens_equal"] == results["check"]["greedy_tokens_compared"]
    assert results["check"]["logits_difference_of_range"] < 1e-4
    assert results["n_params"] == sum(
        p.numel() for p in build_model(tiny_config(), VOCAB).parameters()
    )
    assert results["summary"]["last_over_first_state_bytes"] == 1
    printed = capsys.readouterr().out
    assert "recompute:8" in printed and "last_over_first_position" in printed


def test_bytes_over_time_are_held_against_the_bandwidth(run):
    results = run("--no_gpt", "--recompute", "0")
    row = results["rows"][0]
    rate = row["reads_bytes"] / row["milliseconds"] * 1000
    assert row["reads_of_copy"] * results["bandwidth_bytes_per_second"]["copy"] == pytest.approx(
        rate
    )
    assert row["reads_bytes"] == results["weight_bytes_per_token"]["reads"]
    assert {r["method"] for r in results["rows"]} == {"streaming"}


def test_bfloat16_halves_the_bytes(run):
    wide, narrow = run("--no_gpt"), run("--no_gpt", "--dtype", "bfloat16")
    assert narrow["dtype"] == "bfloat16"
    for count in ("reads", "distinct"):
        bytes_of = [r["weight_bytes_per_token"][count] for r in (wide, narrow)]
        assert bytes_of[0] == 2 * bytes_of[1]


def test_recomputation_reads_the_last_tokens_of_a_growing_text():
    model = build_model(tiny_config(), VOCAB).eval()
    text = torch.randint(VOCAB, (2, 12))
    recomputed = decode.Recomputed(model, text[:, -8:])
    with torch.no_grad():
        for _ in range(3):
            recomputed.step()
            token = model(text[:, -8:])[0][:, -1].argmax(-1, keepdim=True)
            text = torch.cat([text, token], 1)
            assert torch.equal(recomputed.window, text[:, -8:])


def test_summary():
    def row(part, method, position, batch, ms, **more):
        place = {"part": part, "method": method, "position": position, "batch": batch}
        return {**place, "milliseconds": ms, "tokens_per_second": batch / ms, **more}

    counts = ("prepared", "reads", "distinct")
    fractions = {f"{count}_of_{kind}": 0.5 for count in counts for kind in ("copy", "read")}
    memory = {"state_bytes": 10, "resident_bytes": 100}
    streaming = memory | fractions
    rows = [
        row("position", "streaming", 64, 1, 2.0, **streaming),
        row("position", "streaming", 128, 1, 2.5, **{**streaming, "reads_of_copy": 0.7}),
        row("position", "recompute:8", 128, 1, 50.0),
        {"part": "position", "method": "gpt", "position": 128, "batch": 1, "skipped": "why"},
        row("batch", "streaming", 8, 1, 2.0),
        row("batch", "streaming", 8, 16, 4.0),
    ]
    ratios = decode.summary(rows)
    expected = {
        "last_over_first_position": 1.25,
        "last_over_first_state_bytes": 1.0,
        "last_over_first_resident_bytes": 1.0,
        "speedup_over_recompute:8_at_last_position": 20.0,
        "tokens_per_second_of_batch_16_over_1": 8.0,
    }
    assert {key: ratios[key] for key in expected} == expected
    assert ratios["prepared_bytes_of_copy_bandwidth"] == 0.5
    assert ratios["reads_bytes_of_copy_bandwidth"] == 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--positions", "0"], r"--positions: '0' is not a whole number from 1"),
        (["--gpt", "perhaps"], r"'perhaps' is neither true nor false"),
        (["--no_gpt", "--plot", "plot.doc"], r"must end in \.png, \.svg or \.pdf"),
        (["--position", "8"], r"unknown option --position.*--positions"),
    ],
)
def test_mistakes(run, arguments, message):
    with pytest.raises(UserError, match=message):
        run(*arguments)


def test_a_missing_library_is_named_with_its_installation(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r'matplotlib.*pip install "wavelet-lm\[bench\]"'):
        run("--no_gpt", "--plot", "a.png")


def test_plot(run, tmp_path):
    pytest.importorskip("matplotlib")
    run("--no_gpt", "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --- the GPT -------------------------------------------------------------------------------------


@given(st.integers(10_000, 3_000_000_000), st.sampled_from([65, 256, 8192, 50257]))
def test_a_gpt_of_equal_parameters(n_params, vocab_size):
    try:
        n_layer, n_embd, n_head = gpt_shape(n_params, vocab_size)
    except UserError:
        assert n_params < 40 * vocab_size  # hardly more than a table of tokens
        return
    assert abs(gpt_n_params(n_layer, n_embd, vocab_size) / n_params - 1) <= 0.05
    assert n_layer >= 1 and n_embd % n_head == 0 and n_embd // n_head <= 64


def test_the_published_sizes_have_their_own_shape():
    assert gpt_shape(gpt_n_params(12, 768, 50257), 50257) == (12, 768, 12)


def test_a_gpt_that_is_all_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"no GPT with a vocabulary of 50,257 .*--no_gpt"):
        gpt_shape(1000, 50257)


def gpt(size=30_000, context=40):
    return EqualGPT(size, VOCAB, context, torch.float64, torch.device("cpu"))


def test_the_gpt_has_the_parameters_that_were_counted():
    model = gpt()
    assert model.n_params == gpt_n_params(*model.shape[:2], VOCAB)
    assert model.n_position_params == 40 * model.shape[1]
    rows = 2 * model.shape[1]  # of both tables, and the head is one of them
    assert model.weight_bytes_per_token == 8 * (model.n_params + rows)


def test_the_gpt_continues_what_its_cache_holds():
    model = gpt()
    text = model.start(2, 0, 20)  # nothing in the cache: then it is a forward pass of what follows
    for _ in range(2):
        tokens = [torch.randint(VOCAB, (2, 1))]
        text.tokens.copy_(tokens[0])
        for _ in range(8):
            text.step()
            tokens.append(text.tokens.clone())
        whole = torch.cat(tokens, 1)
        logits, _ = model.decoder.model(whole[:, :-1])
        assert torch.equal(logits.argmax(-1), whole[:, 1:])
        text.rewind()


def test_the_gpt_reads_the_random_past_and_goes_back_to_it():
    model = gpt()
    text = model.start(1, 30, 6)
    clock, *caches = text.session.buffers()
    past = caches[0][:, :30].clone()
    assert model.cache_bytes(1, 36) == sum(cache.nbytes for cache in caches)
    for _ in range(3):
        text.rewind()
        for _ in range(6):
            text.step()
        assert clock.tolist() == [36]
    assert torch.equal(caches[0][:, :30], past) and past.std() > 0.5


def test_the_gpt_is_measured_beside_the_others(run, monkeypatch):
    results = run()
    assert places(results, "position", "gpt") == [8, 24] and places(results, "batch", "gpt") == [
        1,
        3,
    ]
    assert abs(results["gpt"]["n_params"] / results["n_params"] - 1) <= 0.05
    monkeypatch.setattr(decode, "_free_bytes", lambda device: 0)
    results = run()
    skipped = [row for row in results["rows"] if "skipped" in row]
    assert len(skipped) == 4 and all(row["method"] == "gpt" for row in skipped)
    assert "its cache needs" in skipped[0]["skipped"]
