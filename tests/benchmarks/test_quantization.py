"""The benchmark of quantized weights, at a size where it says nothing about speed."""

import itertools
import json
import sys

import pytest
import quantization
import report
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.test_evaluate import make_run
from tests.conftest import TINY
from wavelet_lm import UserError
from wavelet_lm.fusion.fuse import COMPONENTS


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run it with these arguments: what it wrote."""
    monkeypatch.setattr(report, "BANDWIDTH_BYTES", {"cpu": 4096, "cuda": 4096})

    def command(*arguments):
        file = tmp_path / "results.json"
        given = ["--device", "cpu", "--steps", "2", "--json", file, *arguments]
        monkeypatch.setattr(sys, "argv", ["quantization.py", *map(str, given)])
        quantization.main()
        return json.loads(file.read_text())

    return command


def test_the_sweep_of_a_run(command, tmp_path, capsys):
    run = make_run(tmp_path, mlp_expansion=2)
    plot = tmp_path / "plot.png"
    arguments = ["--tokens", 200, "--budget", 1, "--calibrate", tmp_path / "text.txt"]
    results = command(run, *arguments, "--plot", plot)
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["all 16"]["cost"] == 0
    assert rows["all 16"]["bits_per_byte"] == pytest.approx(8)
    sizes = [rows[f"all {bits}"]["bytes"] for bits in (16, 8, 4, 2)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    for name in ("mlp", "lifting", "mixer_coarse", "embedding"):
        for bits in (4, 2):
            for row in (rows[f"{name} {bits}"], rows[f"{name} {bits}, calibrated"]):
                assert row["bits"] == {**dict.fromkeys(COMPONENTS, 8), name: bits}
                assert rows["all 2"]["bytes"] < row["bytes"] < rows["all 8"]["bytes"]
    assert not any("mixer_mid" in name for name in rows)  # three scales are all coarse
    # A head of zeros costs nothing in any bits: the smallest is the best, in the mixes too.
    assert results["best"] in ("all 2", "all 2, calibrated")
    (mix,) = (row for row in rows.values() if row["name"].startswith("mix: "))
    assert all(f"{name} 2" in mix["name"] for name in ("mlp", "lifting", "embedding"))
    assert plot.stat().st_size > 1000
    assert "best within 1.0 bits/byte" in capsys.readouterr().out


def test_the_speed_of_a_model(command, tmp_path, capsys):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY))
    results = command("--speed_config", config, "--vocab_size", 50, "--repeats", 2)
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["float32", "native 8-bit", "native 4-bit"]
    assert rows["float32"]["speedup"] == 1
    for row in rows.values():
        speed = row["bytes_per_token"] / row["ms_per_token"] * 1000
        assert row["of_copy_bandwidth"] == pytest.approx(speed / results["bandwidth"]["copy"])
        assert row["speedup"] == pytest.approx(
            rows["float32"]["ms_per_token"] / row["ms_per_token"]
        )
    sizes = [row["bytes"] for row in rows.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert "ms/token" in capsys.readouterr().out


rows = st.fixed_dictionaries({"bytes": st.integers(1, 100), "cost": st.floats(0, 1)})


@given(rows, st.lists(rows, min_size=6, max_size=6), st.floats(0, 2))
def test_mixes_are_all_that_keep_the_budget_the_smallest_first(eight, six, budget):
    alone = dict(zip(itertools.product("abc", (4, 2)), six, strict=True))
    found = list(quantization.mixes(eight, alone, budget))
    totals = []
    for bits in itertools.product((8, 4, 2), repeat=3):
        mix = {name: b for name, b in zip("abc", bits, strict=True) if b < 8}
        cost = eight["cost"] + sum(alone[item]["cost"] - eight["cost"] for item in mix.items())
        assert (mix in found) == (cost <= budget)
        totals.append(mix)
    assert len(found) == len({str(mix) for mix in found}) <= len(totals)

    def size(mix):
        return sum(alone[item]["bytes"] - eight["bytes"] for item in mix.items())

    assert [size(mix) for mix in found] == sorted(size(mix) for mix in found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of them"),
        (["RUN", "--speed_config", "x.json"], "one of them"),
        (["--speed_config", "x.json", "--plot", "x.png"], "leave it out"),
        (["--speed_config", "x.json", "--json", "nowhere/x.json"], "no folder nowhere"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, arguments, words):
    monkeypatch.setattr(sys, "argv", ["quantization.py", *arguments])
    with pytest.raises(UserError, match=words):
        quantization.main()
