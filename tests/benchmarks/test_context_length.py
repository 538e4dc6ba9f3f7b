"""The benchmark of contexts, on a model of a moment and texts that a slow version can read."""

import json
import math
import sys

import context_length
import numpy as np
import pytest
import torch

from tests.conftest import perturb, tiny_config
from wavelet_lm import UserError, build_model
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.inference.decoder import Decoder
from wavelet_lm.models.checkpoint import save_checkpoint

V, BLOCK_SIZE = 13, 8


def small_model(vocab_size=V):
    config = tiny_config(layers=1, levels=2, block_size=BLOCK_SIZE, per_scale_mixer_widths=None)
    model = perturb(build_model(config, vocab_size)).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


def some_texts(K=2, length=41):
    return np.random.default_rng(0).integers(V, size=(K, length))


def slow_nats(model, context, texts, position):
    """Of the target with `position` tokens before it, read from the beginning of each text."""
    decoder = Decoder(model, context=context, adapt=False)
    logits, _ = decoder.prefill(texts[:, :position].tolist())
    return [
        -row.log_softmax(-1)[text[position]].item() for row, text in zip(logits, texts, strict=True)
    ]


@pytest.mark.parametrize("context", ["stream", "window:5", "recompute:7", "recompute:100"])
def test_every_target_is_read_with_its_context(context, monkeypatch):
    monkeypatch.setattr(context_length, "MAX_LOGITS", 10 * V)  # chunks of five, and odd batches
    model, texts = small_model(), some_texts()
    sample = np.array([1, 2, 7, 8, 20, 40])
    positions, nats = context_length.score(model, context, texts, sample)
    for position in sample:
        (at,) = np.flatnonzero(positions == position)
        expected = slow_nats(model, context, texts, position)
        np.testing.assert_allclose(nats[:, at], expected, rtol=1e-9)


def test_figures_of_a_band_are_those_of_its_targets():
    model, texts = small_model(), some_texts(K=3)
    bytes_of = np.arange(1, V + 1)[texts]  # token t has t + 1 bytes
    the_bands = context_length.bands((1, 5), BLOCK_SIZE)
    assert [band[1:] for band in the_bands] == [(0, 8), (8, 40)]
    rows = list(
        context_length.measure(model, texts, bytes_of, ["stream", "recompute:8"], the_bands, 3)
    )
    found = {(row["context"], row["targets"], row["band"]): row for row in rows}
    assert len(found) == len(rows) == 6
    for (context, kind, name), row in found.items():
        start, end = next(band[1:] for band in the_bands if band.name == name)
        positions = {"all": range(start + 1, end + 1), "sampled": [start + 1, 0, end]}[kind]
        if kind == "sampled":
            positions[1] = round((start + 1 + end) / 2)  # halves to even, as numpy does
        nats = np.array([slow_nats(model, context, texts, t) for t in positions])
        sizes = bytes_of[:, list(positions)].T
        per_text = nats.sum(0) / math.log(2) / sizes.sum(0)
        assert row["tokens"] == 3 * len(positions)
        assert row["bytes"] == sizes.sum()
        assert row["per_text"] == pytest.approx(per_text, abs=1e-5)
        assert row["bits_per_byte"] == pytest.approx(
            nats.sum() / math.log(2) / sizes.sum(), abs=1e-5
        )
        assert row["spread"] == pytest.approx(per_text.std(ddof=1), abs=1e-5)
        difference = per_text - found["stream", kind, name]["per_text"]
        assert row["difference"] == pytest.approx(difference.mean(), abs=2e-5)
        error = difference.std(ddof=1) / math.sqrt(3)
        assert row["standard_error"] == pytest.approx(error, abs=2e-5)


def test_texts_do_not_overlap_and_are_spread():
    files = [np.arange(35), np.arange(100, 105), np.arange(200, 220)]
    starts = context_length.cut_texts(files, 10, 99)[:, 0].tolist()
    assert starts == [0, 10, 20, 200, 210]
    assert context_length.cut_texts(files, 10, 3)[:, 0].tolist() == [0, 20, 210]
    with pytest.raises(UserError, match="longest text has 35 tokens and 36 are needed"):
        context_length.cut_texts(files, 36, 1)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the benchmark on a run folder in tmp_path."""
    ByteTokenizer().save(tmp_path / "tokenizer")
    save_checkpoint(tmp_path / "best.safetensors", small_model(256).float(), {})
    text = tmp_path / "text.txt"
    text.write_text("pack my box with five dozen jugs — été\n" * 4, encoding="utf-8")

    def run(*more):
        arguments = ["--checkpoint", tmp_path, "--text", text, "--device", "cpu", *more]
        monkeypatch.setattr(sys, "argv", ["context_length.py", *map(str, arguments)])
        context_length.main()

    return run


def test_the_command_prints_tables_and_writes_json(command, tmp_path, capsys):
    results = tmp_path / "results.json"
    command("--lengths", "1,3", "--texts", "4", "--targets", "2", "--json", results)
    out = capsys.readouterr().out
    assert "4 texts of 25 tokens; block_size 8" in out
    for part in ("all targets", "sampled targets", "≤ 1×", "1–3×", "window:32", "recompute:8"):
        assert part in out
    written = json.loads(results.read_text())
    assert {"machine", "commit", "date", "rows"} <= set(written)
    assert len(written["rows"]) == 2 * (3 * 2 + 1)
    assert all(0 < row["bits_per_byte"] < 100 for row in written["rows"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lengths", "64"], "longest text has 172 tokens and 513 are needed"),
        (["--lengths", "1", "--contexts", "stream,all"], "context is 'all'"),
        (["--json", "missing/folder/x.json"], "there is no folder missing/folder"),
        (["--text", "missing.txt"], "missing.txt: cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_one_line(command, more, message):
    with pytest.raises(UserError, match=message):
        command(*more)
