"""What a command settles before PyTorch is loaded: how its threads wait, and how Ctrl-C ends it.

Every door of the project (`train.py`, `generate.py`, each `python -m`) calls `start` before its
other imports, which take seconds. This module therefore imports nothing of the package and nothing
that is slow. How many CPUs this process may use is said here too, from affinity and quota.
"""

import math
import os
import signal
import sys
from pathlib import Path
from types import FrameType

# Threads that wait for one another in a small product should soon sleep, not spin: the one that
# they wait for may be without a CPU, and they are what keeps it from one. A thousand rounds are as
# fast as any number on a machine that does nothing else (benchmarks/shared_machine.py).
WAIT_POLICY = {"GOMP_SPINCOUNT": "1000"}
# Any of these is the user's own choice of how threads wait.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Either is the user's own choice of their number.
COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def start() -> None:
    """Begin a command: the wait policy, unless the user has set one, and a quiet Ctrl-C."""
    if not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ.update(WAIT_POLICY)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Of a process that is gone one line tells (training/process_group.py), not PyTorch's stack.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, _end_quietly)


def _end_quietly(signum: int, frame: FrameType | None) -> None:
    """End at once: nothing has been opened yet, and imports do not take exceptions well."""
    spec = sys.modules["__main__"].__spec__  # of `python -m`, else None
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    try:
        os.write(2, f"{name}: interrupted\n".encode(errors="replace"))
    finally:
        os._exit(128 + signum)


def ready() -> None:
    """End the start-up: everything is imported, and Ctrl-C raises `KeyboardInterrupt` again."""
    if signal.getsignal(signal.SIGINT) is _end_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# --- how many CPUs -------------------------------------------------------------------------------


def available_cpus(
    cgroups: Path = Path("/sys/fs/cgroup"), memberships: Path = Path("/proc/self/cgroup")
) -> int:
    """CPUs that this process may use: those of its affinity, or fewer by its control group's quota.

    A quota of 1.5 CPUs counts as 2: two threads use all of it, one would not.

    Args:
        cgroups: where the control groups are mounted, version 1 (`cpu/…`), 2, or both.
        memberships: the file that says in which of them this process is.
    """
    on_linux = hasattr(os, "sched_getaffinity")
    n = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    quota = _quota(cgroups, memberships)
    return n if quota is None else min(n, max(1, math.ceil(quota)))


def _quota(cgroups: Path, memberships: Path) -> float | None:
    """The least of the quotas of this process's groups and of the groups around them, in CPUs."""
    try:
        lines = memberships.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # not Linux
        return None
    quotas = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not group:
            continue
        if not controllers:  # version 2
            roots, read = [cgroups, cgroups / "unified"], _quota_2
        elif "cpu" in controllers.split(","):
            roots, read = [cgroups / controllers, cgroups / "cpu"], _quota_1
        else:
            continue
        # A container sees its own group as the root, whatever the path says; then only that exists.
        path = Path(group.lstrip("/"))
        quotas += [read(root / part) for root in roots for part in (path, *path.parents)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_2(folder: Path) -> float | None:
    """`cpu.max`: quota and period in microseconds, or `max` and the period."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # absent, or `max`
        return None


def _quota_1(folder: Path) -> float | None:
    """`cpu.cfs_quota_us` (-1 = none) over `cpu.cfs_period_us`."""
    try:
        quota, period = (
            int((folder / f"cpu.cfs_{part}_us").read_text(encoding="ascii"))
            for part in ("quota", "period")
        )
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
