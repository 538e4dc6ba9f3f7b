"""Whether a run is being trained right now: a lock in its folder that ends with the process."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wavelet_lm.training.run_folder import RunFolder, SilentRunFolder

MARK = ".running"
ENDED, RUNNING, STOPPED, DIED = "ended", "running", "stopped", "died"
PATIENCE = 20  # times that a lock is asked for, which one who looks has for a moment


@contextmanager
def running(run: RunFolder) -> Iterator[None]:
    """Inside, the run is marked as one that is being trained.

    A process that is killed leaves the file and not its lock; one that stops in good order, having
    saved what it had, leaves neither.
    """
    if isinstance(run, SilentRunFolder):
        yield
        return
    mark = run.path / MARK
    try:
        file = mark.open("w")
    except OSError:  # a folder that cannot be written is complained of elsewhere
        yield
        return
    with file:
        for _ in range(PATIENCE):
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
        try:
            yield
        except Exception:  # it failed, and the mark says so
            raise
        except BaseException:  # as by Ctrl-C
            mark.unlink(missing_ok=True)
            raise
        mark.unlink(missing_ok=True)


def state_of(run: RunFolder) -> str:
    """`ended`, `running`, `stopped` (in good order, to be gone on with) or `died`."""
    mark = run.path / MARK
    if _is_locked(mark):
        return RUNNING
    rows = run.metrics()
    ends = [row["step"] for row in rows if row["event"] == "end"]
    trained = [row["step"] for row in rows if row["event"] == "train"]
    if ends and max(ends) >= max(trained, default=0):
        return ENDED
    return DIED if mark.is_file() else STOPPED


def _is_locked(mark: Path) -> bool:
    try:
        with mark.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
