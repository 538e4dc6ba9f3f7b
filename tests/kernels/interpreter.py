"""Tests of Triton's kernels where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path


def in_the_interpreter(file: str) -> str:
    """What pytest says of a file of tests in a process in which Triton interprets its kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    return run.stdout
