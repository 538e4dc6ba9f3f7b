"""The README says what is so: its commands parse, its files exist, its figures are the code's."""

import itertools
import re
import shlex
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

from tests.test_documents import parser_of
from wavelet_lm.cli.flags import parse_flags
from wavelet_lm.cli.generation_flags import parse_options
from wavelet_lm.config import FIELDS, Config, read_json_object
from wavelet_lm.data.modalities import MODALITY_NAMES
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.models.checkpoint import save_checkpoint
from wavelet_lm.models.registry import build_model, n_params
from wavelet_lm.training.memory_estimate import GiB, estimate_bytes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
SPANS = re.findall(r"`([^`]+)`", PROSE)

QUICK_START = (
    "python -m pip install -c constraints.txt -e ."
    " && python train.py --config configs/quickstart.json"
)
TESTS = 'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest -n auto'
# What a run or the reader makes, and what a run folder holds.
MADE = re.compile(r"(data|logs|tokenizer|valid)/|runs\.md|(log|generations)\.txt|environment\.json")


def block(kind: str, containing: str = "") -> str:
    return next(text for language, text in BLOCKS if language == kind and containing in text)


def commands() -> list[list[str]]:
    """Every command of a shell block or an inline span, in words, without its environment."""
    shell = [
        line
        for kind, text in BLOCKS
        if kind == "bash"
        for line in text.replace("\\\n", " ").splitlines()
    ]
    inline = [span for span in SPANS if "python " in span]
    words = [shlex.split(part) for line in shell + inline for part in re.split("&&| [|] ", line)]
    return [list(itertools.dropwhile(lambda word: "=" in word, command)) for command in words]


class Parsed(Exception):
    """Carries a program's parser out of it, once it is complete."""


def program_of(command: list[str]) -> tuple[str, list[str]]:
    """The file that `python …` runs, and its arguments."""
    if command[1] == "-m":
        module = command[2].replace(".", "/")
        is_file = (ROOT / f"{module}.py").is_file()
        return f"{module}.py" if is_file else f"{module}/__main__.py", command[3:]
    return command[1], command[2:]


PROGRAMS = {
    program: [arguments for name, arguments in map(program_of, group)]
    for program, group in itertools.groupby(
        sorted((c for c in commands() if c[0] == "python"), key=program_of),
        key=lambda command: program_of(command)[0],
    )
}


def test_the_set_up_commands_are_the_ones_that_ci_types():
    shell = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    # Quiet or not, pip installs the same.
    typed = [line.strip().replace(" --quiet", "") for line in ci.splitlines()]
    for command in (QUICK_START, TESTS):
        assert command in shell
        assert command in typed


def test_every_kind_of_command_is_found():
    assert {c[0] for c in commands()} <= {"python", "mkdir", "cp", "ln", "echo"}
    assert set(PROGRAMS) == {
        "train.py",
        "generate.py",
        "benchmarks/training.py",
        "benchmarks/decode.py",
        "benchmarks/quantization.py",
        "benchmarks/quantized_matmul.py",
        "wavelet_lm/evaluation/__main__.py",
        "wavelet_lm/evaluation/compare.py",
        "wavelet_lm/evaluation/fsd50k.py",
        "wavelet_lm/evaluation/lra.py",
        "wavelet_lm/inference/quantization/__main__.py",
        "wavelet_lm/models/__main__.py",
        "pip/__main__.py",
        "pytest/__main__.py",
    }


OWN_PROGRAMS = [p for p in PROGRAMS if not p.startswith(("pip/", "pytest/"))]


@pytest.mark.parametrize("program", OWN_PROGRAMS)
def test_commands_parse(program, monkeypatch):
    parser = parser_of(program, monkeypatch)
    for arguments in PROGRAMS[program]:
        if "--help" in arguments:
            continue
        if program == "generate.py":
            parse_options("", arguments)  # which also refuses contradictions
            continue
        if program not in ("train.py", "benchmarks/training.py"):
            parser.parse_args(arguments)
            continue
        flags = parse_flags(parser, arguments)
        file = flags.get("config") or "config.json"
        values = {key: value for key, value in flags.items() if key in FIELDS}
        Config.from_dict({**read_json_object(ROOT / file), **values})


def test_flags_and_keys_in_the_prose_exist(monkeypatch):
    known = set()
    for program in OWN_PROGRAMS:
        known |= parser_of(program, monkeypatch)._option_string_actions.keys()
    flags = {flag for span in SPANS if "python" not in span for flag in re.findall(r"--\w+", span)}
    assert flags and flags <= known
    presets = {path.stem for path in (ROOT / "configs").glob("*.json")}
    presets |= set(MODALITY_NAMES)
    keys = {span for span in SPANS if re.fullmatch(r"[a-z]+(_[a-z]+)+", span)} - presets
    assert len(keys) > 10 and keys <= set(FIELDS)


def test_files_and_links_lead_somewhere():
    paths = {s for s in SPANS if re.fullmatch(r"[\w./-]+(\.(py|json|md|txt|svg)|/)", s)}
    paths = {path for path in paths if not MADE.match(path)}
    targets = re.findall(r"\]\(([^)\s]+)\)", PROSE)
    headings = re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    assert len(targets) > 5
    for target in targets:
        path, _, anchor = target.partition("#")
        assert not anchor or anchor in anchors, target
        paths.add(path)
    places = (ROOT, ROOT / "wavelet_lm")
    assert not [path for path in paths if not any((place / path).exists() for place in places)]


def test_the_presets_have_these_data_tokenizers_and_parameters():
    row = re.compile(
        r"^\| `(config\S*\.json)` \| `(\S+)` \| `(\S+)` \| ([\d,]+) \| ([\d,]+) \|", re.M
    )
    rows = row.findall(README)
    assert len(rows) == 7
    for file, dataset, tokenizer, *numbers in rows:
        config = Config.from_json(ROOT / file)
        vocab_size, parameters = (int(number.replace(",", "")) for number in numbers)
        assert config.dataset == dataset
        assert config.tokenizer in (tokenizer, "auto")
        with torch.device("meta"):
            assert n_params(build_model(config, vocab_size)) == parameters, file


def test_the_headline_figures_are_those_of_the_code():
    prose = " ".join(PROSE.split())
    config = Config.from_json(ROOT / "config.json")
    with torch.device("meta"):
        model = build_model(config, 50257)
    needed = estimate_bytes(config, n_params(model), 50257)
    assert f"about {needed / GiB:.0f} GiB" in prose
    reach = sum(delay.max_lag for delay in model.wavelets[0].delays)
    assert f"back {reach} positions" in prose
    state = config.layers * (reach * config.padded_channels + config.C)
    assert f"{state:,} numbers" in prose
    assert f"its {len(FIELDS)} keys" in prose
    tokens, words = 287_644, 245_569
    assert f"{tokens:,} GPT-2 tokens, {tokens / words:.2f} a word" in prose
    assert f"20 per token is one of {20 ** ((tokens - 1) / words):.1f} per word" in prose


def test_the_python_interface_runs_as_it_stands(tmp_path, monkeypatch):
    config = Config.from_json(ROOT / "configs/quickstart.json", C=16)
    run = tmp_path / "logs" / "RUN"
    ByteTokenizer().save(run / "tokenizer")
    save_checkpoint(run / "best.safetensors", build_model(config, 256), {})
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block("python"), names)
    assert names["logits"].shape == (1, 1, 256)
    assert isinstance(names["text"], str)


# --- the figure ----------------------------------------------------------------------------------


def test_the_figure_needs_nothing_from_outside_and_knows_the_dark():
    text = (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")
    root = xml.etree.ElementTree.fromstring(text)
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"@import|url\((?!#)|@font-face|<image|<script", text)
    assert [e for e in root.iter() if e.tag.endswith(("}title", "}desc"))]
