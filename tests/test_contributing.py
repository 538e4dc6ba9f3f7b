"""The worked examples of CONTRIBUTING.md: each applies, and its test passes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with every example applied, one after the other."""
    copy = tmp_path_factory.mktemp("contributing") / "project"
    skip = shutil.ignore_patterns("__pycache__", "results")
    for name in ("wavelet_lm", "tests", "configs", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ("pyproject.toml", "train.py"):
        shutil.copy(ROOT / name, copy)
    for diff in DIFFS:
        apply = ["git", "apply", "-C1", "--whitespace=nowarn", "-"]
        # Of the copy, not of a repository that it may lie in.
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)}
        done = subprocess.run(
            apply, cwd=copy, input=diff, text=True, capture_output=True, env=environment
        )
        assert done.returncode == 0, f"{diff[:80]}…: {done.stderr}"
    return copy


def run(copy, *arguments):
    """What a Python of its own prints in the copy, which it imports."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def touched(diff):
    return re.findall(r"^\+\+\+ b/(\S+)$", diff, re.MULTILINE)


def test_the_tests_of_the_examples_pass(copy):
    tests = [file for diff in DIFFS for file in touched(diff) if file.startswith("tests/")]
    assert len(tests) == len(DIFFS) == 4
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)


def test_a_switch_touches_its_module_its_declaration_and_its_test(copy):
    package = [file for file in touched(DIFFS[0]) if file.startswith("wavelet_lm/")]
    assert [file for file in package if not file.startswith("wavelet_lm/models/")] == [
        "wavelet_lm/config/model.py"
    ]
    assert "| `embedding_noise` |" in run(copy, "-m", "wavelet_lm.config_reference")
    assert "--embedding_noise" in run(copy, "train.py", "--help")


def test_the_copy_is_what_ran(copy):
    code = "import wavelet_lm.transforms.haar as h; print(h.__file__, h.TriadicWavelet(3).reach)"
    assert run(copy, "-c", code).split() == [f"{copy}/wavelet_lm/transforms/haar.py", "13"]
