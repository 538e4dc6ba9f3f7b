"""Counting a CUDA step without a GPU, in a process of its own: it pretends that there is one."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wavelet_lm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STORED = "benchmarks/results/step_cost.json"
HAS_TOOLS = importlib.util.find_spec("triton") is not None and any(
    map(shutil.which, ("c++", "g++", "clang++"))
)


def step_cost(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/step_cost.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TOOLS, reason="needs triton and a C++ compiler")
def test_a_small_step_costs_no_more_than_what_is_stored():
    done = step_cost("--configs", "tiny", "--check", STORED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("tiny")


@pytest.mark.skipif(not HAS_TOOLS, reason="needs triton and a C++ compiler")
def test_what_is_no_config_is_refused():
    done = step_cost("--configs", "nothing")
    assert done.returncode == 2
    assert "nothing is neither a file nor one of headline, mini" in done.stderr


@pytest.mark.parametrize("text", ["{}", '{"rows": [{"config": "tiny"}]}', '{"rows": [1]}'])
def test_what_has_no_whole_rows_is_refused(text, tmp_path):
    from step_cost import stored_rows

    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(UserError, match="has no rows of this benchmark"):
        stored_rows(str(file), ["tiny"])


def test_growth_is_said_with_its_figures():
    # The functions that compare need no device, but the module asks for the compiler's parts.
    from step_cost import grown

    row = {"kernels": [10, 20], "in_products": [5, 5], "outside": [5, 5], "kept": 7}
    row |= {"optimizer": 20.0}
    assert grown(row, row) == []
    assert grown(row | {"kernels": [10, 23]}, row) == []
    assert grown(row | {"kernels": [10, 24]}, row) == ["kernels grew from 30 to 34"]
    assert grown(row | {"kept": 8}, row) == ["kept grew from 7 to 8"]
