"""`generate.py` as it is typed, on a small run folder."""

import contextlib
import io
import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.conftest import perturb
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
    fwpkm_num_keys=16,
    fwpkm_top_k=3,
    fwpkm_chunk_size=4,
    fwpkm_update_lr=1.0,
    generation_prompt="bad",
    num_new_tokens=5,
)


def make_run(path, letters=LETTERS, seed=0, **config):
    CharTokenizer(letters).save(path / "tokenizer")
    torch.manual_seed(seed)
    model = perturb(build_model(CONFIG.replace(**config), len(letters)), seed=seed)
    with torch.no_grad():  # an untrained model's logits are too flat to tell texts apart
        model.head.weight.mul_(4)
    save_checkpoint(path / "best.safetensors", model, {})
    return path


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def command(*arguments):
    return [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)]


def generate(*arguments, stdin=b""):
    """Run the script in this process: starting Python and PyTorch takes longer than the rest."""
    streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (stdin, b"", b"")]
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    status = 0
    with (
        mock.patch.object(sys, "argv", ["generate.py", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", streams[0]),
        contextlib.redirect_stdout(streams[1]),
        contextlib.redirect_stderr(streams[2]),
    ):
        try:
            runpy.run_path(str(ROOT / "generate.py"), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    texts = []
    for stream in streams[1:]:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))
    return SimpleNamespace(returncode=status, stdout=texts[0], stderr=texts[1])


def text_of(*arguments, **options):
    done = generate(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def error_line(*arguments, **options):
    done = generate(*arguments, **options)
    assert done.returncode == 2
    assert done.stderr.startswith("generate.py: error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    return done.stderr


def test_unset_options_come_from_the_run(run):
    done = subprocess.run(
        command("--checkpoint", run), capture_output=True, encoding="utf-8", cwd=ROOT
    )
    assert done.returncode == 0
    assert done.stdout.startswith("bad")
    assert len(done.stdout) == len("bad") + 5 + 1
    assert done.stderr.count("tokens/s") == 2
    record = (run / "generations.txt").read_text(encoding="utf-8")
    assert '"top_p": 0.95' in record
    assert f"--- command\npython generate.py --checkpoint {run}\n--- metrics\n5 tokens" in record


def test_given_options_win_and_a_checkpoint_file_is_as_good_as_its_run(run):
    options = ("--prompt", "hé", "--num_tokens", 9, "--seed", 3, "--n", 3, "--top_k", 3)
    a = text_of("--checkpoint", run, *options)
    file = run / "best.safetensors"
    b = text_of("--checkpoint", file, *options, "--device", "cpu", "--batch_size", 2)
    assert a == b
    assert a.count("=== sample") == 3
    alone = text_of("--checkpoint", run, *options[:4], "--seed", 5, "--top_k", 3)
    assert a.endswith(alone)


def test_every_strategy_alone_and_together(run, tmp_path):
    draft = make_run(tmp_path / "draft", seed=1)
    base = ("--checkpoint", run, "--num_tokens", 40, "--json")
    texts = {
        flags: json.loads(text_of(*base, *flags.split()))["text"]
        for flags in (
            "",
            "--strategies",
            "--entropy_adaptive --entropy_temp_min 1 --entropy_temp_max 3",
            "--lookahead_k 3",
            "--best_of_n 4",
            "--wavelet_coherence --coherence_weight 5",
            "--fwpkm_inference_updates",
            f"--draft {draft}",
        )
    }
    assert len(set(texts.values())) == len(texts)
    for flags in ("--metrics", "--clean_spacing", "--compile false", "--dtype float32"):
        assert json.loads(text_of(*base, *flags.split()))["text"] == texts[""]
    greedy = json.loads(text_of(*base, "--temperature", 0))["text"]
    for flags in (
        f"--draft {draft} --draft_tokens 2",
        "--context recompute:99",
        "--lookahead_k 1",
        "--context window:99",
    ):
        found = json.loads(text_of(*base, "--temperature", 0, *flags.split()))
        assert found["text"] == greedy
    for flags in (
        "--strategies --best_of_n 3 --wavelet_coherence --fwpkm_inference_updates",
        "--strategies --lookahead_k 2 --lookahead_depth 1 --fwpkm_inference_updates",
        f"--strategies --draft {draft} --best_of_n 2 --context window:5 --dtype bfloat16",
        "--wavelet_coherence --n 2 --stop a --stop é --dtype float16 --ignore_eot",
    ):
        for line in text_of(*base, *flags.split()).splitlines():
            assert json.loads(line)["metrics"]["n_tokens"] <= 40


def test_metrics_are_shown(run):
    done = generate("--checkpoint", run, "--metrics")
    assert done.stderr.startswith("5 tokens, mean log-probability -")


def test_a_prompt_from_a_file_and_from_standard_input(run, tmp_path):
    base = ("--checkpoint", run, "--seed", 3)
    prompted = text_of(*base, "--prompt", "abé\n")
    (tmp_path / "p.txt").write_text("abé\n", encoding="utf-8")
    assert "abé\n" + text_of(*base, "--prompt_file", tmp_path / "p.txt") == prompted
    assert "abé\n" + text_of(*base, "--prompt_file", "-", stdin="abé\n".encode()) == prompted
    assert text_of(*base) == text_of(*base, stdin=b"abc")  # it is not read unasked


def piped(run, text, *arguments, stdin=subprocess.PIPE):
    options = {"input": text} if stdin == subprocess.PIPE else {"stdin": stdin}
    return subprocess.run(
        command(run, "--seed", "3", *arguments), capture_output=True, timeout=300, **options
    )


def test_what_is_piped_in_is_the_prompt(run, tmp_path):
    wanted = text_of("--checkpoint", run, "--prompt", "abc", "--seed", "3")
    assert piped(run, b"abc\n").stdout.decode() == wanted.removeprefix("abc")
    (tmp_path / "file").write_bytes(b"abc")
    with (tmp_path / "file").open("rb") as file:
        assert piped(run, b"", stdin=file).stdout.decode() == wanted.removeprefix("abc")


def test_an_empty_pipe_and_no_pipe_leave_the_prompt_of_the_run(run):
    wanted = text_of("--checkpoint", run, "--seed", "3")
    assert wanted.startswith("bad")
    assert piped(run, b"").stdout.decode() == wanted
    assert piped(run, b"", stdin=subprocess.DEVNULL).stdout.decode() == wanted


def test_a_given_prompt_leaves_standard_input_alone(run):
    """As in `while read line; do generate.py … --prompt "$line"; done < prompts.txt`."""
    line = 'read a; {}; read b; printf "%s|%s" "$a" "$b"'.format(
        " ".join([*command(run, "--prompt", "abc"), ">", "/dev/null", "2>&1"])
    )
    done = subprocess.run(["sh", "-c", line], input=b"one\ntwo\n", capture_output=True)
    assert done.stdout == b"one|two"


def test_no_record_leaves_the_record_alone(run):
    text_of("--checkpoint", run, "--prompt", "abc", "--no_record")
    assert not (run / "generations.txt").exists()
    text_of("--checkpoint", run, "--prompt", "abc")
    assert (run / "generations.txt").exists()


def test_a_batch_of_prompts(run, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "hé", "seed": 7, "num_tokens": 9}\n{"prompt": ""}\n{"prompt": "a"}\n',
        encoding="utf-8",
    )
    done = generate("--checkpoint", run, "--prompts", file, "--batch_size", 2)
    assert "prompt 2 is empty: starting from a line break" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [("hé", 7), ("", 1), ("a", 1)]
    one = text_of("--checkpoint", run, "--prompt", "hé", "--seed", 7, "--num_tokens", 9)
    assert one == "hé" + rows[0]["text"] + "\n"


def test_a_state_is_saved_and_gone_on_with(run, tmp_path):
    state, base = tmp_path / "a.state", ("--checkpoint", run, "--temperature", 0)
    saved = generate(*base, "--prompt", "abc", "--save_state", state, "--num_tokens", 0)
    assert (saved.returncode, saved.stdout) == (0, "")
    assert not (run / "generations.txt").exists()
    assert text_of(*base, "--prompt", "abc hé") == "abc " + text_of(
        *base, "--prompt", " hé", "--load_state", state
    ).removeprefix(" ")
    assert text_of(*base, "--prompt", "abc") == "abc" + text_of(*base, "--load_state", state)
    other = make_run(tmp_path / "other", seed=2)
    line = error_line("--checkpoint", other, "--load_state", state)
    assert "belongs to another model" in line


def test_a_conversation_goes_on_another_day(run, tmp_path):
    state, base = tmp_path / "a.state", ("--checkpoint", run, "--interactive", "--temperature", 0)
    whole = text_of(*base, stdin=b"abc\nbad\n")
    first = text_of(*base, "--save_state", state, stdin=b"abc\n\nignored\n")
    second = text_of(*base, "--load_state", state, stdin=b"bad\n")
    assert whole == first + second
    context = text_of(*base, "--prompt", "abc", stdin=b"bad\n")
    assert context == text_of(*base[:2], *base[3:], "--prompt", "abc\nbad").removeprefix("abc\nbad")


def test_an_empty_prompt_starts_from_a_line_break(run):
    done = generate("--checkpoint", run, "--prompt", "")
    assert done.returncode == 0
    assert "empty prompt: starting from a line break" in done.stderr
    assert len(done.stdout) == 5 + 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "xyz"), "'x'"),
        (("--top_p", "0"), "top_p is 0.0"),
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--temperature", "hot"), "--temperature"),
        (("--num_tokens", "0"), "num_tokens is 0"),
        (("--device", "cuda:99"), "device is cuda:99"),
        (("--frobnicate",), "unknown option --frobnicate"),
        (("--lookahead_k", "2", "--draft", "d"), "contradict"),
        (("--prompt_file", "nowhere.txt"), "nowhere.txt"),
        (("--prompts", "nowhere.txt"), "nowhere.txt"),
        (("--load_state", "nowhere.state"), "nowhere.state"),
        (("--draft", "nowhere"), "nowhere"),
        (("--save_state", "nowhere/a.state"), "nowhere/a.state"),
        (("--wavelet_coherence", "--coherence_levels", "31"), "levels"),
    ],
)
def test_mistakes_are_one_line(run, arguments, words):
    assert words in error_line("--checkpoint", run, *arguments)


def test_bytes_that_are_no_text_are_one_line(run, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"ab\xff")
    for flag in ("--prompt_file", "--prompts"):
        line = error_line("--checkpoint", run, flag, tmp_path / "p.txt")
        assert "p.txt: not UTF-8 at byte 2" in line
    line = error_line("--checkpoint", run, "--prompt_file", "-", stdin=b"ab\xff")
    assert "standard input: not UTF-8 at byte 2" in line


def test_a_run_without_its_tokenizer_or_without_a_checkpoint_is_one_line(run, tmp_path):
    other = make_run(tmp_path / "other", letters=LETTERS.replace("é", "ié"))
    (other / "tokenizer" / "tokenizer.json").replace(run / "tokenizer" / "tokenizer.json")
    assert "has 12 tokens and the model 11" in error_line("--checkpoint", run)
    assert "no tokenizer" in error_line("--checkpoint", other)
    (run / "best.safetensors").unlink()
    assert "no best.safetensors" in error_line("--checkpoint", run)


def test_weights_that_are_not_finite_are_named(run, tmp_path):
    model = build_model(CONFIG, len(LETTERS))
    with torch.no_grad():
        model.head.weight[3, 4] = float("nan")
    save_checkpoint(run / "best.safetensors", model, {})
    words = "best.safetensors: 1 of the 176 values of head.weight are not finite"
    assert words in error_line("--checkpoint", run)
    sound = make_run(tmp_path / "sound")
    assert words in error_line("--checkpoint", sound, "--draft", run)


def test_a_command_with_bytes_that_are_no_text_can_still_be_recorded(run):
    text_of("--checkpoint", run, "--stop", "caf\udce9")
    assert "--stop 'caf?'" in (run / "generations.txt").read_text(encoding="utf-8")


def test_a_draft_of_another_tokenizer_is_one_line(run, tmp_path):
    draft = make_run(tmp_path / "draft", letters=LETTERS.replace("h", "x"))
    line = error_line("--checkpoint", run, "--draft", draft)
    assert "a draft needs the very same one" in line


def test_memory_that_learns_needs_a_model_that_has_it(tmp_path):
    run = make_run(tmp_path / "run", fwpkm_enabled=False)
    line = error_line("--checkpoint", run, "--fwpkm_inference_updates")
    assert "this model lacks" in line


def test_ctrl_c_ends_the_text_and_still_prints_the_speed(run):
    arguments = command("--checkpoint", run, "--num_tokens", 10**9)
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT
    )
    head = process.stdout.read(6)  # the prompt and three characters: it is generating
    process.send_signal(signal.SIGINT)
    # Not `communicate`, which forgets what `read` has buffered.
    rest, errors = process.stdout.read(), process.stderr.read()
    assert process.wait() == 130
    assert "tokens/s" in errors
    assert errors.splitlines()[-1] == "generate.py: interrupted"
    assert rest.endswith("\n")
    record = (run / "generations.txt").read_text(encoding="utf-8")
    text = (head + rest).removeprefix("bad").rstrip("\n")
    assert record.endswith(f"--- text\n{text}\n")
