"""The documents say what is so: commands parse, Python runs, links and names lead somewhere."""

import argparse
import importlib
import importlib.util
import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from wavelet_lm.cli.generate import parse_options
from wavelet_lm.config import FIELDS, Config, parse_value, read_json_object
from wavelet_lm.data.modalities import MODALITY_NAMES
from wavelet_lm.errors import UserError
from wavelet_lm.inference.engine import OPTIONS

ROOT = Path(__file__).parents[1]
GENERATED = ("config.md", "commands.md", "reference.md")  # from the code, by the code
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("[A-Z]*.md")])
}
WRITTEN = [page for page in PAGES if not page.endswith(GENERATED)]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
# What a run or the reader makes, and what a run folder or a data set holds.
MADE = re.compile(
    r"(data|logs|tokenizer|valid|checkpoints|samples|tensorboard|wandb)/|runs\.md|(log|generations)\.txt|(environment|comparison|state)\.json|my\.txt"
    r"|valid\.txt|book\.txt|model\.json|model_generate\.py"
)


def blocks(page: str, kind: str) -> list[str]:
    return [text for _, language, text in FENCE.findall(PAGES[page]) if language == kind]


def prose(page: str) -> str:
    return FENCE.sub("", PAGES[page])


def spans(page: str) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(page))


def commands(page: str) -> list[list[str]]:
    """Every command of a shell block or an inline span, in words, without its environment."""
    shell = [
        line
        for text in blocks(page, "bash")
        for line in text.replace("\\\n", " ").splitlines()
        if line and not line.startswith("#")
    ]
    inline = [" ".join(span.split()) for span in spans(page) if "python " in span]
    lines = [line.split(" > ")[0] for line in shell + inline if "…" not in line]
    words = [shlex.split(part) for line in lines for part in re.split("&&| [|] ", line)]
    found = [list(itertools.dropwhile(lambda word: "=" in word, command)) for command in words]
    return [as_program(command) for command in found]


def as_program(command: list[str]) -> list[str]:
    """`wavelet-lm NAME …` by the file that it runs, and what a launcher of several processes runs
    in each of them; any other command as it is."""
    if command[0] in ("torchrun", "accelerate"):
        program = next(i for i, word in enumerate(command) if word.endswith(".py"))
        return ["python", *command[program:]]
    if command[0] != "wavelet-lm":
        return command
    return ["python", f"wavelet_lm/cli/{command[1]}.py", *command[2:]]


def program_of(command: list[str]) -> tuple[str, list[str]]:
    """The file that `python …` runs, and its arguments."""
    if command[1] == "-m":
        module = command[2].replace(".", "/")
        is_file = (ROOT / f"{module}.py").is_file()
        return f"{module}.py" if is_file else f"{module}/__main__.py", command[3:]
    return command[1], command[2:]


PROGRAMS: dict[str, list[tuple[str, list[str]]]] = {}
for _page in WRITTEN:
    for _command in commands(_page):
        if _command[0] == "python":
            _program, _arguments = program_of(_command)
            PROGRAMS.setdefault(_program, []).append((_page, _arguments))
OTHERS = ("pip/", "pytest/", "wavelet_lm/config_reference", "wavelet_lm/cli/reference")
OWN_PROGRAMS = sorted(program for program in PROGRAMS if not program.startswith(OTHERS))


class Parsed(Exception):
    """Carries a program's parser out of it, once it is complete."""


def parser_of(program: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser that a program builds; one that is a door leads to the module it starts."""
    path = ROOT / program
    door = re.search(r"from (wavelet_lm\.cli\.\w+) import main", path.read_text(encoding="utf-8"))
    if door:
        module = importlib.import_module(door[1])
    else:
        spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
        spec.loader.exec_module(module)

    def capture(parser, *_):
        raise Parsed(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        patch.setattr(sys, "argv", [program])
        with pytest.raises(Parsed) as caught:
            module.main()
    return caught.value.args[0]


def test_every_kind_of_command_is_found():
    first = {command[0] for page in WRITTEN for command in commands(page)}
    of_the_shell = {"mkdir", "cp", "ln", "echo", "cat", "grep", "source", "curl"}
    assert first <= of_the_shell | {"python", "pip", "git", "mkdocs", "ruff"}
    assert not [program for program in OWN_PROGRAMS if not (ROOT / program).is_file()]
    assert {"train.py", "generate.py", "benchmarks/decode.py"} <= set(OWN_PROGRAMS)
    assert sum(program.startswith("wavelet_lm/") for program in OWN_PROGRAMS) >= 7


@pytest.mark.parametrize("program", OWN_PROGRAMS)
def test_commands_parse(program, monkeypatch):
    parser = parser_of(program, monkeypatch)
    for page, arguments in PROGRAMS[program]:
        if "--help" in arguments or not (arguments or program == "train.py"):
            continue  # a program that is named and not run
        try:
            if program == "generate.py":
                parse_options("", arguments)  # which also refuses contradictions
                continue
            found = vars(parser.parse_args(arguments))
        except UserError as error:
            pytest.fail(f"{page}: {program} {shlex.join(arguments)}: {error}")
        if program in ("train.py", "benchmarks/training.py"):
            values = {k: parse_value(k, v) for k, v in found.items() if k in FIELDS}
            file = found.get("config") or "config.json"
            Config.from_dict({**read_json_object(ROOT / file), **values})


def test_flags_and_keys_in_the_prose_exist(monkeypatch):
    known = set()
    for program in OWN_PROGRAMS:
        known |= parser_of(program, monkeypatch)._option_string_actions.keys()
    known |= {"--cpus", "--strict", "--check", "--nproc_per_node"}  # docker mkdocs ruff torchrun
    presets = {path.stem for path in (ROOT / "configs").glob("*.json")}
    names = set(FIELDS) | presets | set(MODALITY_NAMES)
    n_keys = 0
    for page in WRITTEN:
        words = spans(page)
        flags = {f for span in words if "python" not in span for f in re.findall(r"--\w+", span)}
        assert flags <= known, page
        keys = {span for span in words if re.fullmatch(r"[a-z]+(_[a-z]+)+", span)}
        n_keys += len(keys & set(FIELDS))
        if page in KEYS_ALONE:
            assert keys <= names, page
    assert n_keys > 30


KEYS_ALONE = ("docs/how-it-works.md", "docs/training.md", "docs/generation.md", "docs/state.md")


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists() and file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("page", WRITTEN)
def test_files_exist(page):
    paths = {s for s in spans(page) if re.fullmatch(r"[\w./-]+(\.(py|json|md|svg)|/)", s)}
    paths = {path for path in paths if not MADE.match(path)}
    places = (ROOT, ROOT / "wavelet_lm", ROOT / "docs")
    assert not [path for path in paths if not any((place / path).exists() for place in places)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_examples_run(page, checkout, capsys):
    """One after the other; what a comment says that a line prints is printed."""
    names: dict = {}
    for text in blocks(page, "python"):
        exec(compile(text, page, "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        for promised in re.findall(r"print\(.*\)  # (.+)$", text, re.MULTILINE):
            assert promised in printed


def test_every_option_of_the_engine_is_named():
    assert set(OPTIONS) <= set(re.findall(r"`(\w+)`", PAGES["docs/python.md"]))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "json")])
def test_json_examples_are_json(page):
    for text in blocks(page, "json"):
        json.loads(text if text.lstrip().startswith(("{", "[")) else "{" + text + "}")


@pytest.mark.parametrize("name", re.findall(r"^::: (\S+)$", PAGES["docs/reference.md"], re.M))
def test_what_the_reference_names_exists_and_is_described(name):
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    assert thing.__doc__
