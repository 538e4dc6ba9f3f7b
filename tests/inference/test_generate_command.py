"""`generate.py` as it is typed, on a small run folder."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wavelet_lm import Config, build_model
from wavelet_lm.data.tokenizers import CharTokenizer
from wavelet_lm.models.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[2]
LETTERS = "\n abcdefghé"
CONFIG = Config(
    C=16,
    layers=1,
    levels=2,
    per_scale_mixer_widths=None,
    mlp_expansion=1,
    pkm_enabled=False,
    fwpkm_enabled=False,
    generation_prompt="bad",
    num_new_tokens=5,
)


@pytest.fixture
def run(tmp_path):
    tokenizer = CharTokenizer(LETTERS)
    tokenizer.save(tmp_path / "tokenizer")
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "best.safetensors", build_model(CONFIG, len(LETTERS)), {})
    return tmp_path


def command(*arguments):
    return [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)]


def generate(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, encoding="utf-8", cwd=ROOT)


def test_unset_options_come_from_the_run(run):
    done = generate("--checkpoint", run)
    assert done.returncode == 0
    assert done.stdout.startswith("bad")
    assert len(done.stdout) == len("bad") + 5 + 1
    assert done.stderr.count("tokens/s") == 2
    assert '"top_p": 0.95' in (run / "generations.txt").read_text(encoding="utf-8")


def test_given_options_win_and_a_checkpoint_file_is_as_good_as_its_run(run):
    options = ("--prompt", "hé", "--num_tokens", 9, "--seed", 3, "--n", 2, "--top_k", 3)
    a = generate("--checkpoint", run, *options)
    b = generate("--checkpoint", run / "best.safetensors", *options, "--device", "cpu")
    assert a.returncode == 0
    assert a.stdout == b.stdout
    assert a.stdout.count("=== sample") == 2
    alone = generate("--checkpoint", run, *options[:4], "--seed", 4, "--top_k", 3)
    assert a.stdout.endswith(alone.stdout)


def test_an_empty_prompt_starts_from_a_line_break(run):
    done = generate("--checkpoint", run, "--prompt", "")
    assert done.returncode == 0
    assert "empty prompt: starting from a line break" in done.stderr
    assert len(done.stdout) == 5 + 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompt", "xyz"),
        ("--top_p", "0"),
        ("--temperature", "-1"),
        ("--temperature", "hot"),
        ("--num_tokens", "0"),
        ("--device", "cuda:99"),
        ("--frobnicate",),
    ],
)
def test_mistakes_are_one_line(run, arguments):
    done = generate("--checkpoint", run, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("generate.py: error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_run_without_its_tokenizer_or_without_a_checkpoint_is_one_line(run):
    (run / "best.safetensors").rename(run / "kept")
    missing = generate("--checkpoint", run)
    (run / "kept").rename(run / "best.safetensors")
    (run / "tokenizer").rename(run / "elsewhere")
    for done in (missing, generate("--checkpoint", run)):
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1


def test_weights_that_are_not_finite_name_the_checkpoint(run):
    model = build_model(CONFIG, len(LETTERS))
    torch.nn.init.constant_(model.head.weight, float("nan"))
    save_checkpoint(run / "best.safetensors", model, {})
    done = generate("--checkpoint", run)
    assert done.returncode == 2
    assert "best.safetensors: the model's output is not finite" in done.stderr


def test_ctrl_c_ends_the_text_and_still_prints_the_speed(run):
    arguments = command("--checkpoint", run, "--num_tokens", 10**9)
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT
    )
    head = process.stdout.read(6)  # the prompt and three characters: it is generating
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate()
    assert process.returncode == 130
    assert "tokens/s" in errors
    assert errors.splitlines()[-1] == "generate.py: interrupted"
    assert rest.endswith("\n")
    record = (run / "generations.txt").read_text(encoding="utf-8")
    assert record.endswith("--- text\n" + (head + rest).removeprefix("bad"))
