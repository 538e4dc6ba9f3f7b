"""What the benchmarks share."""

import argparse
import statistics

import pytest
import report
import torch
from hypothesis import given
from hypothesis import strategies as st

CPU = torch.device("cpu")


def test_every_call_is_timed():
    calls = []
    seconds = report.step_seconds(lambda: calls.append(1), 3, CPU)
    assert len(calls) == len(seconds) == 3 and min(seconds) >= 0


def test_measurements_take_turns_and_every_other_time_in_reverse():
    calls = []

    def measurement(name):
        return lambda: calls.append(name) or [float(len(calls))]

    samples = report.alternate({name: measurement(name) for name in "abc"}, 3)
    assert "".join(calls) == "abccbaabc"
    assert samples == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


@given(st.lists(st.floats(-10, 10), min_size=1))
def test_median(values):
    assert report.median(values) == pytest.approx(statistics.median(values))


def test_bandwidth_counts_what_is_moved(monkeypatch):
    monkeypatch.setattr(report, "step_seconds", lambda step, n, device: step() is None or [0.5])
    assert report.bandwidth(CPU, 4096) == {"copy": 2 * 4096 / 0.5, "read": 4096 / 0.5}


def test_resident_memory_grows_with_a_tensor():
    before = report.resident_bytes(CPU)
    if before is None:
        pytest.skip("this system does not say")
    held = torch.ones(2**23)
    assert report.resident_bytes(CPU) - before > held.nbytes / 2


def test_table():
    text = report.table(["", "number"], [["long name", 1], ["x", None]])
    assert text.splitlines() == ["           number", "long name       1", "x               –"]


def test_arguments():
    assert report.positives("16,4,4") == (4, 16)
    assert report.natural("0") == 0
    assert report.boolean("True") is True and report.boolean("false") is False
    for parse, text, message in (
        (report.positive, "0", "'0' is not a whole number from 1"),
        (report.positives, "1,,2", "'' is not a whole number from 1"),
        (report.positives, "a", "'a' is not a whole number from 1"),
        (report.natural, "-1", "'-1' is not a whole number from 0"),
        (report.boolean, "maybe", "'maybe' is neither true nor false"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            parse(text)
