"""Writing files so that nothing half-written is ever taken for whole."""

import contextlib
import errno
import itertools
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wavelet_lm.errors import UserError

_numbers = itertools.count()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`.

    A symbolic link stays one: the file that it names is replaced. What is no regular file (a FIFO,
    a device) is never replaced; on success the content is written to it.

    On any failure the temporary file is removed and `path` is as it was; a full disk and a missing
    permission become a `UserError`.
    """
    path = Path(path)
    temporary = None
    try:
        direct = _is_written_directly(path)
        target = Path(os.path.realpath(path))
        folder = Path(tempfile.gettempdir()) if direct else target.parent
        # Cut off, for a name may be as long as the file system allows.
        name = os.fsdecode(os.fsencode(target.name)[:200])
        temporary = folder / f".{name}.{os.getpid()}.{next(_numbers)}.tmp"
        yield temporary
        if direct:
            _write_into(path, temporary)
            return
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise as_user_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _is_written_directly(path: Path) -> bool:
    """Whether a rename would do harm: no regular file, or where a standard stream goes to."""
    try:
        status = path.stat()  # of the target of a link
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        return True
    for descriptor in (1, 2):  # such as /dev/stdout of `… > file`
        with contextlib.suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                return True
    return False


def _write_into(path: Path, source: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    with os.fdopen(descriptor, "wb", buffering=0) as file, source.open("rb") as content:
        while piece := content.read(1 << 20):
            while piece:
                piece = piece[file.write(piece) :]


def check_writable(path: str | Path) -> None:
    """Raise `UserError` before a long computation whose result could not be written to `path`."""
    path = Path(path)
    folder = Path(os.path.realpath(path)).parent
    try:
        if _is_written_directly(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        elif not folder.is_dir():
            shown = folder if path.is_symlink() else path.parent
            raise UserError(f"{path}: there is no folder {shown}; make it first")
        else:
            _check_folder(folder)
    except OSError as error:
        raise as_user_error(error, path) from error


def check_new_folder(path: str | Path) -> None:
    """Raise `UserError` where no folder could be made at `path`, or in a folder of its parents'."""
    path = Path(path)
    try:
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _check_folder(parent)
    except OSError as error:
        raise as_user_error(error, path) from error


def _check_folder(folder: Path) -> None:
    """Make and remove a file there: rights alone do not tell of a file system's mood."""
    trial = folder / f".{os.getpid()}.{next(_numbers)}.tmp"
    try:
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    finally:
        trial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replace the file's content by `text`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: str | Path, line: str) -> None:
    """Add one line in a single write, so that concurrent writers do not mix theirs."""
    data = (line.rstrip("\n") + "\n").encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            while data:  # a disk that fills up takes a part of it, and refuses the rest
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise as_user_error(error, Path(path)) from error


def as_user_error(error: OSError, path: Path) -> UserError:
    """The one line for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full; free some space in {path.parent} and go on")
    return UserError(f"{path}: cannot be written ({error.strerror or error})")


def unreadable(error: OSError, path: Path) -> UserError:
    """The one line for a file that could not be read."""
    return UserError(f"{path}: cannot be read ({error.strerror or error})")


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
