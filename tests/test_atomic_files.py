"""Files that are whole or not there, lines that do not mix, and errors that are one line."""

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from wavelet_lm.atomic_files import (
    append_line,
    as_user_error,
    atomic_path,
    check_new_folder,
    check_writable,
    write_text,
)
from wavelet_lm.errors import UserError


@contextmanager
def small_disk():
    """Within it no file can grow past 1000 bytes; kept short, for pytest's own output is a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(kind(fd)) or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda a, b: done.append("rename") or replace(a, b))
    write_text(tmp_path / "x", "text")
    assert done == ["file", "rename", "folder"]


def kind(descriptor):
    return "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_stops_the_writing_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "x"
    write_text(path, "old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise error
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_in_mid_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_text(path, "old")
    with pytest.raises(UserError, match="x: cannot be written"), small_disk():
        write_text(path, "y" * 2000)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named():
    for number in (errno.ENOSPC, errno.EDQUOT):
        message = str(as_user_error(OSError(number, "whatever"), Path("/somewhere/x")))
        assert message == "/somewhere/x: the disk is full; free some space in /somewhere and go on"
    assert "Permission denied" in str(as_user_error(PermissionError(13, "Permission denied"), "x"))


def test_a_line_that_the_disk_takes_in_part_is_an_error(tmp_path):
    path = tmp_path / "x"
    append_line(path, "first")
    with pytest.raises(UserError, match="x: cannot be written"), small_disk():
        append_line(path, "y" * 2000)
    assert path.read_text(encoding="utf-8").startswith("first\n")


def test_lines_without_a_folder_are_an_error(tmp_path):
    for write in (append_line, write_text):
        with pytest.raises(UserError, match="No such file or directory"):
            write(tmp_path / "missing" / "x", "text")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    for write in (append_line, write_text):
        with pytest.raises(UserError, match="Permission denied"):
            write(tmp_path / "x", "text")


def test_lines_end_once(tmp_path):
    path = tmp_path / "x"
    for line in ("a", "b\n", "c\nd"):
        append_line(path, line)
    assert path.read_text(encoding="utf-8") == "a\nb\nc\nd\n"


def test_lines_of_several_processes_do_not_mix(tmp_path):
    path = tmp_path / "x"
    program = (
        "import sys\nfrom wavelet_lm.atomic_files import append_line\nsys.stdin.readline()\n"
        "for i in range(300): append_line(sys.argv[1], sys.argv[2] * 700)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path), letter],
            stdin=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        for letter in "ab"
    ]
    for process in processes:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        assert process.wait() == 0
        process.stdin.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == ["a" * 700] * 300 + ["b" * 700] * 300


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link, dead = tmp_path / "folder" / "x", tmp_path / "link", tmp_path / "dead"
    write_text(target, "old")
    link.symlink_to(target)
    dead.symlink_to("folder/y")
    for path in (link, dead):
        check_writable(path)
        write_text(path, "new")
        assert path.is_symlink()
        assert path.read_text(encoding="utf-8") == "new"
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["x", "y"]


def test_a_circle_of_links_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for write in (check_writable, lambda path: write_text(path, "text")):
        with pytest.raises(UserError, match="a: cannot be written"):
            write(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


def test_a_fifo_is_written_to_and_stays(tmp_path):
    fifo, got = tmp_path / "fifo", []
    os.mkfifo(fifo)
    check_writable(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_text(encoding="utf-8")))
    reader.start()
    write_text(fifo, "text" * 50_000)
    reader.join()
    assert got == ["text" * 50_000]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert list(tmp_path.iterdir()) == [fifo]


def test_a_device_is_written_to_and_stays(tmp_path):
    node = tmp_path / "null"
    try:
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        node.write_text("text", encoding="utf-8")
    except OSError:
        pytest.skip("only root may make a device, and not everywhere")
    check_writable(node)
    write_text(node, "text")
    assert stat.S_ISCHR(node.stat().st_mode)


def test_where_standard_output_goes_is_not_replaced(tmp_path):
    path = tmp_path / "x"
    program = (
        "from wavelet_lm.atomic_files import write_text\nprint('first', flush=True)\n"
        "write_text('/dev/stdout', 'second\\n')\nprint('third')\n"
    )
    with path.open("a", encoding="utf-8") as file:
        subprocess.run(
            [sys.executable, "-c", program], stdout=file, check=True, cwd=Path(__file__).parents[1]
        )
    assert path.read_text(encoding="utf-8") == "first\nsecond\nthird\n"


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("é" * 127)
    write_text(path, "text")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="File name too long"):
        check_writable(tmp_path / ("x" * 256))


def test_places_that_cannot_be_written_are_found_before_there_is_anything_to_write(tmp_path):
    file = tmp_path / "file"
    file.touch()
    check_writable(file)
    check_writable(tmp_path / "new")
    check_new_folder(tmp_path / "new" / "newer")
    assert list(tmp_path.iterdir()) == [file]
    for path, words in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "x", "there is no folder"),
        (file / "x", "Not a directory"),
    ):
        with pytest.raises(UserError, match=words):
            check_writable(path)
    with pytest.raises(UserError, match="Not a directory"):
        check_new_folder(file / "x" / "y")
