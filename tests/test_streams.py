"""Standard streams that are full, closed, or read by nobody: how every kind of command ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_generate import make_run
from tests.training import runs

ROOT = Path(__file__).parents[1]
FULL = "standard output: the disk is full; free some space and run it again\n"
CLOSED = "standard output cannot be written (it is closed); give it a place to go\n"
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")

# A command that does as its first argument says, without the seconds that PyTorch takes.
PROGRAM = """
import sys
from wavelet_lm import streams
from wavelet_lm.errors import UserError
from wavelet_lm.errors import run_command

def main():
    what = sys.argv[1]
    if what == "optional":
        streams.output_is_optional()
    if what == "bytes":
        sys.stdout.reconfigure(errors="replace")
    print("text", flush=what != "buffered")
    print("speed", file=sys.stderr)
    if what == "many":
        while True:
            print("more")
    if what == "error":
        raise UserError("too small")
    open(sys.argv[2], "w").write("done")

sys.argv[0] = "program.py"
run_command(main)
"""


def shell(arguments, redirections, program=PROGRAM):
    start = [sys.executable, "-c", program] if program else [sys.executable]
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirections}', "bash", *start, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("what", "redirections", "status", "stdout", "stderr"),
    [
        pytest.param("plain", "> /dev/full", 2, "", f"error: {FULL}", marks=needs_full),
        pytest.param("buffered", "> /dev/full", 2, "", f"speed\nerror: {FULL}", marks=needs_full),
        pytest.param("plain", "2> /dev/full", 0, "text\n", "", marks=needs_full),
        pytest.param("plain", "> /dev/full 2> /dev/full", 2, "", "", marks=needs_full),
        pytest.param("optional", "> /dev/full", 0, "", "speed\n", marks=needs_full),
        ("plain", ">&-", 2, "", f"error: {CLOSED}"),
        ("bytes", ">&-", 2, "", f"error: {CLOSED}"),
        ("buffered", ">&-", 2, "", f"speed\nerror: {CLOSED}"),
        ("optional", ">&- 2>&-", 0, "", ""),
        ("plain", "2>&-", 0, "text\n", ""),
        ("error", "2>&-", 2, "text\n", ""),
        ("error", "<&-", 2, "text\n", "speed\nerror: too small\n"),
        ("many", "| head -n 1; exit ${PIPESTATUS[0]}", 0, "text\n", "speed\n"),
    ],
)
def test_how_a_command_ends(what, redirections, status, stdout, stderr, tmp_path):
    done = shell([what, tmp_path / "file"], redirections)
    said = done.stderr.replace("program.py: ", "")
    assert (done.returncode, done.stdout, said) == (status, stdout, stderr)
    if status == 0 and what != "many":  # and no stray line has got into what was opened
        assert (tmp_path / "file").read_text(encoding="utf-8") == "done"


# --- the real commands ---------------------------------------------------------------------------


@needs_full
def test_json_lines_that_find_no_room_are_recorded_all_the_same(tmp_path):
    run = make_run(tmp_path / "run")
    done = shell(
        ["generate.py", run, "--n", 3, "--batch_size", 3, "--json"], "> /dev/full", program=None
    )
    assert (done.returncode, done.stderr) == (2, f"generate.py: error: {FULL}")
    record = (run / "generations.txt").read_text(encoding="utf-8")
    assert record.count("--- text\n") == 3


def test_json_lines_stay_alone_without_standard_error(tmp_path):
    run = make_run(tmp_path / "run")
    done = shell(["generate.py", run, "--n", 2, "--json"], "2>&- <&-", program=None)
    assert done.returncode == 0
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["bad"] * 2


def test_a_conversation_without_standard_input_ends(tmp_path):
    run = make_run(tmp_path / "run")
    done = shell(["generate.py", run, "--interactive"], "<&-", program=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_full
@pytest.mark.parametrize("name", ["evaluation", "models"])
def test_figures_are_in_the_file_when_standard_output_is_full(name, tmp_path):
    config, file = runs.config_file(tmp_path), tmp_path / "figures.json"
    arguments = ["--vocab_size", 9]
    if name == "evaluation":
        run = make_run(tmp_path / "run")
        text = tmp_path / "text.txt"
        text.write_text("bad cab\n" * 40, encoding="utf-8")
        config, arguments = run, ["--dataset", text]
    done = shell(
        ["-m", f"wavelet_lm.{name}", config, *arguments, "--json", file],
        "> /dev/full",
        program=None,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines(keepends=True)[-1] == f"wavelet_lm.{name}: error: {FULL}"
    assert "Traceback" not in done.stderr
    assert json.loads(file.read_text(encoding="utf-8"))


def test_a_comparison_goes_on_for_its_file_when_its_terminal_is_gone(tmp_path):
    file = tmp_path / "figures.json"
    words = "--task mqar --model gpt+heads=1,gpt+heads=2 --pairs 4 --keys 8 --values 8 --length 24"
    words += " --layers 1 --C 8 --steps 2 --batch 2 --examples 4 --device cpu"
    start = ["-m", "wavelet_lm.evaluation.recall", *words.split(), "--json", file]
    done = shell(start, ">&- 2>&-", program=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(json.loads(file.read_text(encoding="utf-8"))["runs"]) == 2


@needs_full
@pytest.mark.parametrize("name", ["cli.reference", "config_reference"])
def test_pages_that_find_no_room(name):
    done = shell(["-m", f"wavelet_lm.{name}"], "> /dev/full", program=None)
    assert (done.returncode, done.stderr) == (2, f"wavelet_lm.{name}: error: {FULL}")


@pytest.mark.parametrize(
    "redirections",
    [
        pytest.param("> /dev/full 2> /dev/full", marks=needs_full),
        ">&- 2>&- <&-",
        "2>&1 | true; exit ${PIPESTATUS[0]}",
    ],
)
def test_training_goes_on_when_its_terminal_is_gone(redirections, tmp_path):
    config = runs.config_file(tmp_path, max_steps=3)
    done = shell(["train.py", "--config", config], redirections, program=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    run = runs.only_run(tmp_path)
    assert '"event": "end"' in (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert "more of it: " in (run / "log.txt").read_text(encoding="utf-8")
