"""The habits that all command lines share: spellings, aliases, the run, the version."""

import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from wavelet_lm import __version__
from wavelet_lm.cli.flags import ALIASES, OneLineParser, add_config_flags, parse_flags
from wavelet_lm.cli.generation_flags import build_parser, parse_options
from wavelet_lm.config import ConfigError
from wavelet_lm.errors import UserError

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    "train.py",
    "generate.py",
    "wavelet_lm/evaluation/__main__.py",
    "wavelet_lm/evaluation/compare.py",
    "wavelet_lm/evaluation/fsd50k.py",
    "wavelet_lm/evaluation/lra.py",
    "wavelet_lm/evaluation/recall.py",
    "wavelet_lm/scope/__main__.py",
    "wavelet_lm/inference/quantization/__main__.py",
    "wavelet_lm/interop/published.py",
    "wavelet_lm/models/__main__.py",
    "wavelet_lm/serving/__main__.py",
    "wavelet_lm/data/tasks/listops.py",
    *(
        f"benchmarks/{path.name}"
        for path in sorted((ROOT / "benchmarks").glob("*.py"))
        if "OneLineParser" in path.read_text(encoding="utf-8")
    ),
]


def main_of(program):
    """What a door starts."""
    text = (ROOT / program).read_text(encoding="utf-8")
    if found := re.search(r"from (wavelet_lm\.cli\.\w+) import main", text):
        return import_module(found[1]).main
    return runpy.run_path(str(ROOT / program), run_name="parsed")["main"]


class Parsed(Exception):
    """Stops a program where it has parsed its command line; holds what it found."""


@pytest.fixture
def parsed(monkeypatch):
    """What a program makes of its arguments, by name; nothing else of it runs."""

    def run(program, *arguments):
        real = OneLineParser.parse_args

        def stop(parser, args=None, namespace=None):
            raise Parsed(vars(real(parser, args, namespace)), parser)

        monkeypatch.setattr(OneLineParser, "parse_args", stop)
        monkeypatch.setattr("sys.argv", [program, *map(str, arguments)])
        main = main_of(program)
        try:
            with pytest.raises(Parsed) as found:
                main()
        finally:
            monkeypatch.setattr(OneLineParser, "parse_args", real)
        return found.value.args

    return run


NEEDED = {  # what each needs beside a flag
    "generate.py": ["RUN"],
    "wavelet_lm/evaluation/__main__.py": ["RUN"],
    "wavelet_lm/inference/quantization/__main__.py": ["RUN", "--out", "OUT"],
    "wavelet_lm/interop/published.py": ["RUN", "--out", "OUT"],
    "wavelet_lm/models/__main__.py": ["config.json"],
    "wavelet_lm/serving/__main__.py": ["RUN"],
    "wavelet_lm/scope/__main__.py": ["RUN"],
    "wavelet_lm/data/tasks/listops.py": ["FOLDER"],
    "benchmarks/checkouts.py": ["FOLDER", "--config", "FILE"],
    "benchmarks/context_length.py": ["RUN", "--text", "TEXT"],
    "benchmarks/plot_run.py": ["RUN"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_may_be_written_with_hyphens(program, parsed):
    needed = NEEDED.get(program, [])
    _, parser = parsed(program, *needed)
    tried = 0
    for flag, action in parser._option_string_actions.items():
        if "_" not in flag or flag.lstrip("-").replace("_", "-") in ("no-version",):
            continue
        # A number with a default may have a range that 1 is not in.
        usual = action.default if isinstance(action.default, float) else 1
        value = str(usual if action.choices is None else action.choices[0])
        values = [value] if action.nargs is None else []
        found, _ = parsed(program, *needed, flag.replace("_", "-"), *values)
        expected, _ = parsed(program, *needed, flag, *values)
        assert found == expected
        if values:
            assert parsed(program, *needed, f"{flag.replace('_', '-')}={value}")[0] == expected
        tried += 1
        if tried == 12:  # they share one parser
            break
    assert tried > 0 or not any("_" in flag for flag in parser._option_string_actions)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_says_its_version(program, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [program, "--version"])
    with pytest.raises(SystemExit) as end:
        main_of(program)()
    assert end.value.code in (None, 0)
    assert f"WaveletLM {__version__}" in capsys.readouterr().out


@pytest.mark.parametrize("program", [p for p, needed in NEEDED.items() if needed[0] == "RUN"])
def test_a_run_comes_first_or_as_a_flag_or_last(program, parsed):
    _, *rest = NEEDED[program]
    for arguments in (
        ["logs/a b", *rest],
        ["--checkpoint", "logs/a b", *rest],
        ["--checkpoint=logs/a b", *rest],
        ["logs/a b", *rest, "--checkpoint", "logs/a b"],
    ):
        assert parsed(program, *arguments)[0]["checkpoint"] == "logs/a b", arguments
    with pytest.raises(ConfigError, match=r"'a' and --checkpoint 'b' both name the run"):
        parsed(program, "a", *rest, "--checkpoint", "b")
    with pytest.raises(ConfigError, match="which run"):
        parsed(program, *rest)
    if "--text" not in rest:  # which takes all texts that follow
        assert parsed(program, *rest, "logs/a b")[0]["checkpoint"] == "logs/a b"
        with pytest.raises(ConfigError, match="unexpected argument 'c'"):
            parsed(program, "a", *rest, "c")


@pytest.mark.parametrize(
    ("program", "typed", "meant"),
    [
        ("generate.py", "--max_new_tokens", "num_tokens"),
        ("generate.py", "--max-new-tokens", "num_tokens"),
        ("generate.py", "--num_return_sequences", "n"),
        ("generate.py", "--num-samples", "n"),
        ("train.py", "--learning_rate", "lr"),
        ("train.py", "--max-iters", "max_steps"),
        ("train.py", "--gradient_accumulation_steps", "grad_accum"),
        ("train.py", "--max_new_tokens", "num_new_tokens"),
        ("train.py", "--max_grad_norm", "grad_clip"),
        ("train.py", "--n_embd", "C"),
        ("train.py", "--n-head", "heads"),
        ("train.py", "--n_layer", "layers"),
        ("train.py", "--num-train-epochs", "epochs"),
        ("train.py", "--per_device_train_batch_size", "micro_batch_size"),
        ("generate.py", "--speculate_k", "draft_tokens"),
    ],
)
def test_names_from_elsewhere(program, typed, meant, parsed):
    assert int(parsed(program, *NEEDED.get(program, []), typed, "3")[0][meant]) == 3


def test_checkpoints_by_the_names_of_elsewhere(parsed):
    found, _ = parsed("generate.py", "--checkpoint_path", "a", "--draft_checkpoint_path=b")
    assert (found["checkpoint"], found["draft"]) == ("a", "b")


def test_every_alias_stands_for_a_flag_and_hides_none():
    parser = OneLineParser()
    add_config_flags(parser)
    known = {*build_parser("")._option_string_actions, *parser._option_string_actions}
    for alias, names in ALIASES.items():
        assert f"--{alias}" not in known
        assert {f"--{name}" for name in names} <= known


def test_a_boolean_is_turned_off_with_hyphens_too():
    parser = OneLineParser()
    add_config_flags(parser)
    assert parse_flags(parser, ["--no-use-amp", "--wavelet-crawl", "false", "--pkm-enabled"]) == {
        "use_amp": False,
        "wavelet_crawl": False,
        "pkm_enabled": True,
    }


def test_help_shows_one_spelling():
    parser = OneLineParser()
    add_config_flags(parser)
    text = parser.format_help()
    assert "--max_steps" in text
    assert "--max-steps" not in text
    assert "--learning" not in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--stop", "---"], "--stop needs a value, and '---' looks like an option; if it is the"),
        (["--stop", "---"], "--stop=---"),
        (["--stop", "--"], "--stop=--"),
        (["--prompt", "-x"], "--prompt=-x"),
        (["--prompt", "--json"], "--prompt needs a value, and '--json' looks like an option"),
        (["--prompt", "--top-k"], "--prompt needs a value, and '--top-k' looks like an option"),
        (["--prompt", "--max-new-tokens"], "'--max-new-tokens' looks like an option"),
        (["--prompt"], "expected one argument"),
        (["--seed", "-1"], "seed is -1; it must be between"),
        (["--top_p", "-1e-3"], "top_p is -0.001; it must be"),
        (["--num_tokes", "3"], "did you mean --num_tokens?"),
        (["--num-tokes", "3"], "unknown option --num-tokes; did you mean --num_tokens?"),
        (["--num-samplez", "3"], "did you mean --n?"),
        (["--learning_rate", "3"], "unknown option --learning_rate"),
    ],
)
def test_a_mistake_says_what_to_write(line, words):
    with pytest.raises(UserError) as error:
        parse_options("", ["RUN", *line])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["---", "-x", "--", "-", "--json", "--top-k=3", "", "--a-b=c d"])
def test_texts_like_flags_can_be_given(text):
    options = parse_options("", ["RUN", f"--stop={text or '='}", f"--prompt={text}", "--seed", "3"])
    assert (options.stop, options.prompt, options.seed) == ((text or "=",), text, 3)


@pytest.mark.parametrize("text", ["- a", "-- a note", "--a-b c", "-5", "-1e-3", "-", "a--b-c", ""])
def test_texts_that_are_no_flags_are_taken_as_they_are(text):
    options = parse_options("", ["RUN", "--prompt", text, "--top-k", "3"])
    assert (options.prompt, options.top_k) == (text, 3)


def test_the_real_commands_say_their_version():
    done = subprocess.run(
        [sys.executable, "generate.py", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"WaveletLM {__version__} (PyTorch ")
