"""`python -m wavelet_lm.inference.quantization` as it is typed, and what reads what it makes."""

import errno
import sys

import pytest
import torch

from tests.cli.test_generate import (
    CONFIG,
    LETTERS,
    error_line,
    generate,
    make_run,
    text_of,
)
from wavelet_lm import Config, UserError, build_model
from wavelet_lm.cli import quantize as command
from wavelet_lm.models.checkpoint import Checkpoint, save_checkpoint
from wavelet_lm.training.run import resume, train


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run8"


@pytest.fixture
def quantization(monkeypatch, capsys):
    """Type the command in this process: what it prints."""

    def typed(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantization", *map(str, arguments)])
        command.main()
        return capsys.readouterr()

    return typed


def refusal(quantization, *arguments):
    with pytest.raises(UserError) as caught:
        quantization(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a bad cafe hé had a cabbage\n" * 60, encoding="utf-8")
    return file


def test_a_quantized_run_writes_what_the_run_does_when_quantized(run, out, quantization):
    printed = quantization(run, "--out", out)
    assert printed.out == f"try it: python generate.py --checkpoint {out}\n"
    assert printed.err.startswith("8-bit weights: ")
    assert printed.err.endswith("of bf16\n")
    assert sorted(p.name for p in out.iterdir()) == ["best.safetensors", "config.json", "tokenizer"]
    assert Config.from_json(out / "config.json") == CONFIG
    assert Checkpoint(out / "best.safetensors").metadata == {"quantized_from": "run"}
    for flags in (
        "--temperature 0 --num_tokens 30",
        "--seed 3 --num_tokens 20 --n 2",
        "--temperature 0 --num_tokens 20 --dtype bfloat16",
        "--seed 2 --context window:5 --lookahead_k 2 --num_tokens 9",
        "--strategies --best_of_n 2 --wavelet_coherence --num_tokens 20",
    ):
        quantized = text_of("--checkpoint", run, "--ptq8", *flags.split())
        assert text_of("--checkpoint", out, *flags.split()) == quantized
        assert text_of("--checkpoint", out / "best.safetensors", *flags.split()) == quantized
    assert "8-bit weights: " in generate("--checkpoint", run, "--ptq8").stderr
    line = error_line("--checkpoint", out, "--ptq8")
    assert f"{out} is quantized already" in line
    assert "is quantized already" in refusal(quantization, out, "--out", out.parent / "again")


def test_few_bits_and_a_calibration_text(tmp_path, out, text, quantization):
    flags = ("--ptq_bits", 4, "--ptq_mlp_bits", 2, "--ptq_group_size", 32, "--ptq_calibrate", text)
    run = make_run(tmp_path / "run", block_size=16)
    printed = quantization(run, "--out", out, *flags)
    assert "calibrating lifting\ncalibrating blocks.0\n" in printed.err
    assert "4-bit weights (mlp 2), calibrated: " in printed.err
    base = ("--temperature", 0, "--num_tokens", 30)
    expected = text_of("--checkpoint", run, "--ptq8", *flags, *base)
    assert text_of("--checkpoint", out, *base) == expected


def test_the_config_of_a_run_decides_where_no_flag_does(tmp_path, quantization):
    run = make_run(tmp_path / "run", quantize_enabled=True, quantize_bits=4)
    base = ("--temperature", 0, "--num_tokens", 20)
    done = generate("--checkpoint", run, *base)
    assert "4-bit weights: " in done.stderr
    quantization(run, "--out", tmp_path / "run4")
    assert text_of("--checkpoint", tmp_path / "run4", *base) == done.stdout
    plain = make_run(tmp_path / "plain")
    assert text_of("--checkpoint", run, "--no_ptq8", *base) == text_of("--checkpoint", plain, *base)


@pytest.mark.parametrize("flags", [(), ("--dtype", "bfloat16")])
def test_states_belong_to_the_weights_that_read_them(run, out, tmp_path, quantization, flags):
    quantization(run, "--out", out)
    state, base = tmp_path / "a.state", ("--temperature", 0, *flags)
    text_of("--checkpoint", run, "--ptq8", *base, "--prompt", "abc", "--save_state", state)
    whole = text_of("--checkpoint", out, *base, "--load_state", state)
    assert text_of("--checkpoint", run, "--ptq8", *base, "--load_state", state) == whole
    line = error_line("--checkpoint", run, *base, "--load_state", state)
    assert "belongs to another model" in line


def test_a_quantized_draft_and_memories_that_learn(run, out, tmp_path, quantization):
    quantization(run, "--out", out)
    base = ("--checkpoint", run, "--temperature", 0, "--num_tokens", 40)
    drafted = generate(*base, "--draft", out)
    assert drafted.stdout == text_of(*base)
    line = error_line("--checkpoint", out, "--fwpkm_inference_updates")
    assert "quantized for fixed fast weights; quantize it again with" in line
    learning = tmp_path / "learning8"
    quantization(run, "--out", learning, "--fwpkm_inference_updates")
    base = ("--num_tokens", 40, "--seed", 2)
    learned = text_of("--checkpoint", run, "--ptq8", "--fwpkm_inference_updates", *base)
    assert text_of("--checkpoint", learning, *base) == learned
    assert learned != text_of("--checkpoint", out, *base)
    line = error_line("--checkpoint", learning, "--no_fwpkm_inference_updates")
    assert "quantized for learning fast weights; quantize it again with" in line
    without = make_run(tmp_path / "without", fwpkm_enabled=False)
    words = refusal(quantization, without, "--out", tmp_path / "x", "--fwpkm_inference_updates")
    assert "this model lacks" in words


def test_mistakes_leave_nothing_behind(run, out, text, tmp_path, quantization, monkeypatch):
    assert "nowhere" in refusal(quantization, tmp_path / "nowhere", "--out", out)
    none = ("--ptq_bits", 4, "--ptq_calibrate", tmp_path / "none.txt")
    assert "none.txt" in refusal(quantization, run, "--out", out, *none)
    (tmp_path / "short.txt").write_text("abc", encoding="utf-8")
    short = ("--ptq_bits", 4, "--ptq_calibrate", tmp_path / "short.txt")
    assert "tokens; calibrating needs" in refusal(quantization, run, "--out", out, *short)
    assert "there are none" in refusal(quantization, run, "--out", out, "--ptq_calibrate", text)
    assert "(mlp)" in refusal(
        quantization, run, "--out", out, "--ptq_backend", "torchao", "--ptq_mlp_bits", 4
    )
    beneath = text / "run8"
    assert str(beneath) in refusal(quantization, run, "--out", beneath)
    with pytest.raises(UserError, match="--frobnicate"):
        quantization(run, "--out", out, "--frobnicate")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", lambda *a, **k: full())
        assert "the disk is full" in refusal(quantization, run, "--out", out)
    assert not out.exists()
    out.mkdir()
    assert f"{out}: already there" in refusal(quantization, run, "--out", out)
    assert list(out.iterdir()) == []


def test_weights_that_are_not_finite_are_named(run, out, quantization):
    model = build_model(CONFIG, len(LETTERS))
    with torch.no_grad():
        model.head.weight[3, 4] = float("nan")
    save_checkpoint(run / "best.safetensors", model, {})
    words = refusal(quantization, run, "--out", out)
    assert "1 of the 176 values of head.weight are not finite" in words
    assert not out.exists()


def test_training_starts_from_full_precision_alone(run, out, text, tmp_path, quantization):
    quantization(run, "--out", out)
    values = {"dataset": str(text), "cache_dir": str(tmp_path / "cache"), "block_size": 8}
    folders = {"out_dir": str(tmp_path / "logs"), "runs_file": None, "device": "cpu"}
    config = CONFIG.replace(**values, **folders, init_from=str(out))
    with pytest.raises(UserError, match="its weights are quantized, for generation and evaluation"):
        train(config)
    assert not (tmp_path / "logs").exists()
    with pytest.raises(UserError, match="run8"):
        resume(out)
