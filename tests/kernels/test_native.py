"""Compiling a kernel: what is kept, and what happens where that does not work."""

import ctypes
import os
import stat
from pathlib import Path

import pytest

from wavelet_lm.kernels import native

SOURCE = 'extern "C" NUMBER twice(NUMBER x) { return 2 * x + EXTRA; }\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caches = (native.library, native._writable_folder, native._temporary)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "twice.cpp"
    path.write_text(SOURCE)
    return path


def kept(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*"))


def compiler(tmp_path, monkeypatch, script: str) -> None:
    """A compiler that does what a shell script says, and only that one."""
    path = tmp_path / "bin" / "c++"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    monkeypatch.delenv("CXX", raising=False)


def test_macros_make_libraries_of_their_own(source, tmp_path):
    library = native.library(source, NUMBER="double", EXTRA=1)
    library.twice.restype, library.twice.argtypes = ctypes.c_double, [ctypes.c_double]
    assert library.twice(1.25) == 3.5
    assert native.library(source, NUMBER="long", EXTRA=0).twice(4) == 8
    assert sum(name.startswith("twice-") for name in kept(tmp_path)) == 2


def test_a_library_is_compiled_once(source, tmp_path, monkeypatch):
    native.library(source, NUMBER="long", EXTRA=0)
    native.library.cache_clear()
    monkeypatch.setattr(native, "_run", lambda *arguments: pytest.fail("compiled again"))
    assert native.library(source, NUMBER="long", EXTRA=0).twice(4) == 8
    source.write_text(SOURCE + "// changed\n")
    native.library.cache_clear()
    with pytest.raises(pytest.fail.Exception):
        native.library(source, NUMBER="long", EXTRA=0)


def test_no_compiler_is_said(source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    with pytest.warns(UserWarning, match=r"twice.cpp runs as plain PyTorch.*no C\+\+ compiler"):
        assert native.library(source) is None


def test_a_compiler_that_fails_is_said_and_leaves_nothing(source, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, 'echo "no room" >&2; exit 3')
    with pytest.warns(UserWarning, match=r"failed with status 3 \(no room\)"):
        assert native.library(source) is None
    assert kept(tmp_path) == ["kernels", "wavelet_lm"]


def test_a_compiler_that_does_not_know_the_processor_is_asked_without(
    source, tmp_path, monkeypatch
):
    compiler(
        tmp_path,
        monkeypatch,
        'case "$*" in *-march=native*) exit 1;; esac\nPATH=${PATH#*:}\nexec c++ "$@"',
    )
    assert native.library(source, NUMBER="long", EXTRA=0).twice(4) == 8


def test_what_is_no_library_is_said(source, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, 'while [ "$1" != -o ]; do shift; done; echo junk > "$2"')
    with pytest.warns(UserWarning, match="twice.cpp runs as plain PyTorch"):
        assert native.library(source) is None
    assert kept(tmp_path) == ["kernels", "wavelet_lm"]


def test_a_cache_that_cannot_be_written_is_done_without(source, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    assert native.library(source, NUMBER="long", EXTRA=1).twice(4) == 9
