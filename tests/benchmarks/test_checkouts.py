"""The benchmark that compares checkouts, on this one beside itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"C": 8, "layers": 1, "levels": 1, "block_size": 8, "mlp_expansion": 1, "lr": 0.01}
SMALL |= {"per_scale_mixer_widths": None, "pkm_enabled": False, "fwpkm_enabled": False}


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL))
    return file


def checkouts(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/checkouts.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_checkout_beside_itself_has_the_same_losses(config, tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    out = tmp_path / "out.json"
    done = checkouts(
        *(tmp_path / "link", ".", "--config", config, "--starts", 2, "--turns", 1, "--steps", 2),
        *("--json", out),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["checkout"] for row in rows] == [str(tmp_path / "link"), "."]
    assert rows[0]["ratio"] == rows[0]["least_ratio"] == rows[0]["largest_ratio"] == 1
    assert rows[1]["least_ratio"] <= rows[1]["ratio"] <= rows[1]["largest_ratio"]
    assert rows[1]["largest_difference_of_losses"] == 0
    assert 0 < rows[1]["least_ms"] <= rows[1]["median_ms"]


def test_what_is_no_checkout_is_refused_in_one_line(config, tmp_path):
    done = checkouts(tmp_path, "--config", config)
    assert done.returncode == 2
    assert f"{tmp_path} is no checkout of this project" in done.stderr
