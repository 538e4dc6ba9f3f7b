"""`runs.md`: what a row says, and that none is lost."""

import re
import subprocess
import sys

import pytest

from tests.training import runs
from wavelet_lm.errors import UserError
from wavelet_lm.training.run import train
from wavelet_lm.training.runs_table import COLUMNS, append_run


def rows(path):
    """The cells of the table's lines below its header, split as Markdown does."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert lines[0] == f"| {' | '.join(COLUMNS)} |"
    assert set(lines[1]) <= set("|- ")
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]
    unescaped = [[cell.strip().replace("\\|", "|") for cell in row] for row in cells]
    return [dict(zip(COLUMNS, row, strict=True)) for row in unescaped]


def test_the_header_is_written_once_and_rows_follow(tmp_path):
    path = tmp_path / "new" / "runs.md"
    append_run(path, {"name": "one", "hours": "0.1"})
    append_run(path, {"name": "two"})
    assert path.read_text(encoding="utf-8").startswith("# Runs\n")
    assert [row["name"] for row in rows(path)] == ["one", "two"]
    assert rows(path)[0]["hours"] == "0.1"
    assert rows(path)[0]["data"] == ""


def test_bars_and_line_breaks_stay_in_their_cell(tmp_path):
    path = tmp_path / "runs.md"
    append_run(path, {"name": "a|b\nc", "command": "`x | y`"})
    text = path.read_text(encoding="utf-8")
    assert "a\\|b c" in text
    assert "`x \\| y`" in text
    assert rows(path)[0]["name"] == "a|b c"


def test_text_around_the_table_is_kept(tmp_path):
    path = tmp_path / "runs.md"
    append_run(path, {"name": "one"})
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    append_run(path, {"name": "two"})
    assert [row["name"] for row in rows(path)] == ["one", "two"]


def test_runs_that_end_together_lose_no_row(tmp_path):
    path = tmp_path / "runs.md"
    program = (
        "import sys\n"
        "from wavelet_lm.training.runs_table import append_run\n"
        "sys.stdin.readline()\n"
        "for i in range(20): append_run(sys.argv[1], {'name': f'{sys.argv[2]}-{i}'})\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path), str(k)], stdin=subprocess.PIPE, cwd=runs.ROOT
        )
        for k in range(3)
    ]
    for process in processes:  # all are there before the first begins
        process.stdin.write(b"go\n")
        process.stdin.flush()
    assert [process.wait() for process in processes] == [0, 0, 0]
    for process in processes:
        process.stdin.close()
    names = [row["name"] for row in rows(path)]
    assert sorted(names) == sorted(f"{k}-{i}" for k in range(3) for i in range(20))


def test_a_table_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        append_run(tmp_path / "file" / "runs.md", {})


def test_the_row_of_a_run(tmp_path):
    run = train(runs.run_config(tmp_path, max_steps=3))
    (row,) = rows(tmp_path / "runs.md")
    assert row["name"] == run.name
    assert row["split"] == "test"
    test = next(r for r in run.metrics() if r["event"] == "test")
    assert row["bits/byte"] == f"{test['sliding']['bits_per_byte']:.4f}"
    assert row["parameters"] == f"{test['n_params']:,}"
    assert "C 16, layers 2, levels 2, block 16, char, Adagrad 0.01, 3 steps" in row["key settings"]


def test_an_empty_runs_file_writes_none(tmp_path):
    train(runs.run_config(tmp_path, max_steps=2, runs_file=""))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "logs", "words.txt"]
