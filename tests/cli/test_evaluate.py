"""`python -m wavelet_lm.evaluation RUN` as it is typed, on a small run folder."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wavelet_lm import Config, UserError, build_model
from wavelet_lm.cli.evaluate import main as evaluation_main
from wavelet_lm.cli.quantize import quantize_run
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.evaluation.likelihood import evaluate_run
from wavelet_lm.models.checkpoint import load_own_model, save_checkpoint
from wavelet_lm.quantization.options import QuantizationOptions

ROOT = Path(__file__).parents[2]
SMALL = {
    "C": 16,
    "layers": 1,
    "levels": 2,
    "per_scale_mixer_widths": None,
    "mlp_expansion": 1,
    "pkm_enabled": False,
    "fwpkm_enabled": False,
    "block_size": 8,
    "tokenizer": "bytes",
}


def make_run(folder, **changes):
    """A model that gives every byte the same probability, and the text that it is to predict."""
    text = folder / "text.txt"
    text.write_text("pack my box with five dozen jugs — été\n" * 40, encoding="utf-8")
    config = Config(
        **{**SMALL, "dataset": str(text), "cache_dir": str(folder / "cache"), **changes}
    )
    ByteTokenizer().save(folder / "tokenizer")
    model = build_model(config, 256)
    torch.nn.init.zeros_(model.head.weight)
    save_checkpoint(folder / "best.safetensors", model, {})
    return folder


def evaluation(*arguments):
    command = [sys.executable, "-m", "wavelet_lm.evaluation", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)


def test_the_command_prints_the_table_and_writes_json(tmp_path):
    run, file = make_run(tmp_path), tmp_path / "results.json"
    done = evaluation(run, "--split", "valid", "--json", file)
    assert done.returncode == 0, done.stderr
    assert "bits/byte" in done.stdout
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["split"] == "valid"
    for name in ("non_overlapping", "sliding"):
        assert results[name]["bits_per_byte"] == pytest.approx(8, rel=1e-6)
        assert results[name]["nll"] == pytest.approx(math.log(256), rel=1e-6)
        assert f"{results[name]['tokens']:,}" in done.stdout


def test_the_default_split_is_test(tmp_path):
    results = evaluate_run(make_run(tmp_path), device="cpu", log=lambda _: None)
    assert results["split"] == "test"


def test_without_a_test_split_valid_is_used_and_said_to_be(tmp_path):
    run, lines = make_run(tmp_path, split=(0.8, 0.2, 0)), []
    results = evaluate_run(run, device="cpu", log=lines.append)
    assert results["split"] == "valid"
    assert any("no test split; evaluating on valid" in line for line in lines)
    with pytest.raises(UserError, match="no test split; use --split valid"):
        evaluate_run(run, "test", device="cpu", log=lines.append)


def test_other_data_with_the_tokenizer_of_the_run(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("0123456789" * 30, encoding="utf-8")
    results = evaluate_run(
        make_run(tmp_path), "test", dataset=str(other), device="cpu", log=lambda _: None
    )
    assert results["tokenizer"] == "bytes"
    assert results["sliding"]["tokens"] < 30


def test_a_quantized_model_stands_below_with_what_it_costs(tmp_path, monkeypatch, capsys):
    run, file = make_run(tmp_path), tmp_path / "results.json"
    model = build_model(load_own_model(run).config, 256)
    save_checkpoint(run / "best.safetensors", model, {})  # with a head that tells bytes apart
    flags = ("--ptq8", "--ptq_bits", "2", "--ptq_embedding_bits", "8", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["evaluation", str(run), "--json", str(file), *flags])
    evaluation_main()
    results = json.loads(file.read_text(encoding="utf-8"))
    plain = evaluate_run(run, device="cpu", log=lambda _: None)
    quantize_run(
        run, tmp_path / "run2", QuantizationOptions(ptq8=True, ptq_bits=2, ptq_embedding_bits=8)
    )
    saved = evaluate_run(tmp_path / "run2", device="cpu", log=lambda _: None)
    assert "quantized" not in plain
    assert "quantized" not in saved
    quantized = results["quantized"]
    assert quantized["scheme"] == "2-bit weights (embedding 8)"
    costs = []
    for name in ("non_overlapping", "sliding"):
        for key in ("nll", "bits_per_byte", "tokens", "bytes"):
            assert results[name][key] == plain[name][key]
            assert quantized[name][key] == saved[name][key]
        costs.append(quantized[name]["bits_per_byte"] - results[name]["bits_per_byte"])
    assert costs[0] != 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "2-bit weights (embedding 8):"
    for i, rows in ((2, results), (5, quantized)):
        assert lines[i].startswith("non-overlapping, 8 by 8")
        assert lines[i + 1].startswith("sliding, 8 by 4")
        assert f"{rows['non_overlapping']['bits_per_byte']:.4f}" in lines[i]
        assert f"{rows['sliding']['bits_per_byte']:.4f}" in lines[i + 1]
    assert lines[7] == (
        f"quantizing costs {costs[0]:+.5f} bits/byte non-overlapping,"
        f" {costs[1]:+.5f} bits/byte sliding"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--split", "exam"),
        ("--batch_size", "0"),
        ("--device", "tpu"),
        ("--dataset", "/nowhere/to/be/found.txt"),
        ("--json", "/nowhere/to/be/found/results.json"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments):
    done = evaluation(make_run(tmp_path), *arguments)
    assert done.returncode == 2
    assert "error: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
