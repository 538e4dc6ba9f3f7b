"""Standard streams that may be full, closed, or read by nobody.

`guard` puts streams of our own in their places. What standard error cannot take is dropped. What
standard output cannot take raises `OutputFailed`, once; then all is dropped, so that nothing fails
a second time while the command ends, and `finish` says what the user should hear. Training goes on
without a terminal: after `output_is_optional` nothing is raised.
"""

import contextlib
import errno
import io
import os
import sys
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


class OutputFailed(Exception):
    """Standard output cannot be written; `run_command` ends the command."""


class _Stream(io.FileIO):
    """The bytes of a standard stream, dropped from the first failure on."""

    def __init__(self, descriptor: int, required: bool, broken: OSError | None = None):
        super().__init__(descriptor, "w", closefd=False)
        self.required, self.broken, self.lost = required, broken, False

    def write(self, data) -> int:
        if self.broken is None:
            try:
                return super().write(data)
            except OSError as error:
                self.broken = error
        first, self.lost = not self.lost, True
        if first and self.required:
            raise OutputFailed(str(self.broken))
        return memoryview(data).nbytes


_output: _Stream | None = None


def guard() -> None:
    """Guard the process's own streams; what has been put in their places by a program is left."""
    global _output
    for descriptor, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: no file that is opened later may be taken for it
            os.open(os.devnull, flags)  # takes the lowest number that is free
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  (until the process ends)
    if sys.stdout is sys.__stdout__:
        _output = _Stream(1, True, OSError("it is closed") if sys.stdout is None else None)
        sys.stdout = _text(_output, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Stream(2, False), sys.stderr, "backslashreplace")


def _text(raw: _Stream, old: io.TextIOWrapper | None, errors: str = "strict") -> io.TextIOWrapper:
    """The text stream over `raw` that behaves like `old`, which may be closed."""
    if old is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", errors)
    old.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        old.encoding,
        old.errors,
        line_buffering=old.line_buffering or old.write_through or raw.fileno() == 2,
    )


def output_is_optional() -> None:
    """From now on the command's purpose is not what it prints."""
    if _output is not None:
        _output.required = False


def finish() -> str:
    """Write what is buffered; returns why output was lost, as one line, or "" if nobody minds."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OutputFailed, OSError, ValueError):  # ours know it by now
            stream.flush()
    if _output is None or not (_output.lost and _output.required):
        return ""
    error = _output.broken
    if error.errno == errno.EPIPE:
        return ""
    if error.errno in FULL:
        return "standard output: the disk is full; free some space and run it again"
    return f"standard output cannot be written ({error.strerror or error}); give it a place to go"
