"""How commands end: the status, and one line on standard error."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from wavelet_lm.errors import Interrupted
from wavelet_lm.errors import UserError
from wavelet_lm.errors import run_command

def main():
    print("ready", flush=True)
    {body}

sys.argv[0] = "/some/where/program.py"
run_command(main)
"""


def start(body):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ("pass", 0, ""),
        ("raise UserError('too small')", 2, "program.py: error: too small\n"),
        ("raise Interrupted(15, 'saved')", 143, "program.py: saved\n"),
        ("raise KeyboardInterrupt", 130, "program.py: interrupted\n"),
    ],
)
def test_status_and_line(body, status, line):
    process = start(body)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (status, line)


@pytest.mark.parametrize(
    ("signum", "status", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "hung up"),
    ],
)
def test_signals_clean_up_before_they_end_the_command(signum, status, word, tmp_path):
    path = tmp_path / "x"
    process = start(
        f"from wavelet_lm.atomic_files import atomic_path\n"
        f"    with atomic_path({str(path)!r}) as file:\n"
        f"        file.write_text('half')\n"
        f"        print('writing', flush=True)\n"
        f"        sys.stdin.read()"
    )
    assert process.stdout.readline() == "writing\n"
    assert list(tmp_path.iterdir())
    process.send_signal(signum)
    # Not communicate: closing standard input would let the program go on by itself.
    assert process.stderr.read() == f"program.py: {word}\n"
    assert process.wait() == status
    process.communicate()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_saved_at_the_end_is_saved_however_often_the_signal_comes(signum, tmp_path):
    path = tmp_path / "x"
    process = start(
        f"import os\n"
        f"    try:\n"
        f"        os.kill(os.getpid(), {signum:d})\n"
        f"        sys.stdin.read()\n"
        f"    finally:\n"
        f"        os.kill(os.getpid(), {signal.SIGTERM:d})\n"
        f"        os.kill(os.getpid(), {signal.SIGHUP:d})\n"
        f"        open({str(path)!r}, 'w').write('saved')"
    )
    _, errors = process.communicate()
    word = "terminated" if signum == signal.SIGTERM else "hung up"
    assert (process.returncode, errors) == (128 + signum, f"program.py: {word}\n")
    assert path.read_text() == "saved"


def test_a_defect_shows_its_trace():
    process = start("1 / 0")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "ZeroDivisionError" in errors
