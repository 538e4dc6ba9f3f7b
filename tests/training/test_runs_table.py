"""`runs.md`: what a row says, and that none is lost."""

import re
import subprocess
import sys
from unittest import mock

import pytest

from tests.training import runs
from wavelet_lm.errors import UserError
from wavelet_lm.training import provenance
from wavelet_lm.training.provenance import command_line, commit
from wavelet_lm.training.run import resume, train
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
        "for i in range(8): append_run(sys.argv[1], {'name': f'{sys.argv[2]}-{i}'})\n"
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
    assert sorted(names) == sorted(f"{k}-{i}" for k in range(3) for i in range(8))


def test_a_table_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        append_run(tmp_path / "file" / "runs.md", {})


def unwritable(folder):
    """Tables that no run could add its row to, root's neither."""
    (folder / "file").write_text("", encoding="utf-8")
    (folder / "folder.md").mkdir()
    (folder / "latin.md").write_bytes(b"caf\xe9")
    return [folder / "file" / "runs.md", folder / "folder.md", folder / "latin.md"]


def test_a_table_or_folder_that_cannot_be_written_is_found_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("wavelet_lm.training.run.prepare_data", None)
    for table in unwritable(tmp_path):
        with pytest.raises(UserError, match="give --runs_file another name, or none"):
            train(runs.run_config(tmp_path, runs_file=str(table)))
    with pytest.raises(UserError, match="file is no folder"):
        train(runs.run_config(tmp_path, out_dir=str(tmp_path / "file" / "logs")))
    assert not (tmp_path / "logs").exists()


def test_a_table_that_breaks_during_the_run_does_not_keep_it_from_ending(tmp_path, capsys):
    def breaks(path, row):
        raise UserError(f"{path}: the disk is full")

    with mock.patch("wavelet_lm.training.conclusion.append_run", breaks):
        run = train(runs.run_config(tmp_path, max_steps=3))
    assert run.metrics()[-1]["event"] == "end"
    log = (run.path / "log.txt").read_text(encoding="utf-8")
    assert "finished, but without a row" in log
    assert f"| {run.name} | words |" in log
    with pytest.raises(UserError, match="this run is finished"):
        resume(run.path)


def test_the_commands_of_a_row_can_be_typed_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.txt").write_text("", encoding="utf-8")
    words = ["--dataset", tmp_path / "a b.txt", f"--out_dir={tmp_path}", "--prompt", "/usr", "-x="]
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train.py"), *map(str, words)])
    assert command_line() == ("python train.py --dataset 'a b.txt' --out_dir=. --prompt /usr -x=")


def test_a_row_does_not_mark_the_commit_as_changed(tmp_path, monkeypatch):
    """In a checkout of its own, whose table and code are tracked."""
    package = tmp_path / "package"
    package.mkdir()
    for name in ("runs.md", "results.json", "package/code.py", "train.py"):
        (tmp_path / name).write_text("\n", encoding="utf-8")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "code.py"))
    clean = commit()
    assert len(clean) == 12
    append_run(tmp_path / "runs.md", {"name": "one"})
    (tmp_path / "results.json").write_text("[]", encoding="utf-8")
    assert commit() == clean
    for name in ("train.py", "package/code.py"):
        (tmp_path / name).write_text("pass\n", encoding="utf-8")
        assert commit() == f"{clean}+"
        (tmp_path / name).write_text("\n", encoding="utf-8")


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
