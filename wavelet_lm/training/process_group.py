"""Several processes that train one model: how they find each other, agree, and end together.

Each has a heart that beats: a thread that counts up its own number in the store of the rendezvous,
watches the next process, and looks whether one has failed. So a process that is killed is missed by
another, and one that waits in a collective for what will never come is ended. A process of the same
machine is watched by its number there, which says at once that it has ended; of another machine, by
its beats.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from wavelet_lm.errors import Interrupted, UserError
from wavelet_lm.training.processes import Made, Processes

BEAT = 1.0  # seconds between two beats
MISSED = 20.0  # seconds without one after which a process of another machine is gone
LOOK = 5.0  # seconds in which a living process is seen to beat
GRACE = 5.0  # seconds that a process has to end by itself after another has failed
HEARD = 3.0  # seconds that the others have to hear of it, where this process holds the store
POLL = 0.05
RENDEZVOUS = timedelta(minutes=10)
# Of a collective: a process that is gone is found by its heart; one may well wait for a long save.
COLLECTIVE = timedelta(hours=2)
VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
STATUS = 2


class ProcessGroup(Processes):
    """Several processes, each with the number that the environment gives it.

    Raises:
        UserError: a variable is missing, or the others cannot be reached.
    """

    def __init__(self) -> None:
        for name in VARIABLES:
            if name not in os.environ:
                raise UserError(
                    f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {name} is not set; start several"
                    " processes with torchrun --nproc_per_node=N train.py …"
                )
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self._store, self._heart_store = self._found(), self._found()
        self._n_told = self._n_turns = self._n_waits = 0
        self._connected = False
        self._ending, self._unsaid = threading.Event(), threading.Lock()
        self._leaving, self._is_out = threading.Event(), threading.Event()  # of the store
        self.note: Callable[[str], None] = sys.stderr.write  # what is for no one line
        self._place = place()
        self._store.set(f"place/{self.rank}", self._place)
        threading.Thread(target=self._beat, name="heart", daemon=True).start()
        if not self.is_main:
            # One voice: what the others would say twice is said by the first.
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115

    def _found(self) -> dist.Store:
        """A connection of its own to the store; one that waits would keep others from it."""
        try:
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.size, timeout=RENDEZVOUS))
        except (dist.DistError, ValueError, RuntimeError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"the other processes cannot be reached at {address}: {first_line(error)}"
            ) from None
        return dist.PrefixStore("wavelet_lm", store)

    # --- computing together -----------------------------------------------------------------------

    def device_name(self, name: str) -> str:
        if name.startswith("cuda:"):
            raise UserError(
                f"device is {name} and {self.size} processes were started, each for a GPU of its"
                " own; use --device cuda, or CUDA_VISIBLE_DEVICES to choose"
            )
        has_gpu = torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if name == "cuda" or (name == "auto" and has_gpu) else name

    def connect(self, device: torch.device) -> None:
        if self._connected:
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=COLLECTIVE,
        )
        self._connected = True

    def seed(self, seed: int, step: int = 0) -> None:
        if self.rank:
            words = np.random.SeedSequence((seed, self.rank, step)).generate_state(1, np.uint64)
            torch.manual_seed(int(words[0]) >> 1)

    def total(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def joined(self, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    # --- waiting for one another, for as long as it takes -----------------------------------------

    def told(self, value: Callable[[], Any]) -> Any:
        self._n_told += 1
        key = f"told/{self._n_told}"
        if self.is_main:
            said = value()
            self._store.set(key, json.dumps(said))
            return said
        self._wait(lambda: self._store.check([key]))
        return json.loads(self._store.get(key))

    def in_turn(self, make: Callable[[], Made]) -> Made:
        self._n_turns += 1
        key = f"turn/{self._n_turns}/{self.rank - self.local_rank}"
        if self.local_rank:
            self._wait(lambda: self._store.check([key]))
            return make()
        made = make()
        self._store.set(key, "made")
        return made

    def wait_for_all(self) -> None:
        self._n_waits += 1
        key = f"waits/{self._n_waits}"
        self._store.add(key, 1)
        self._wait(lambda: self._store.add(key, 0) >= self.size)

    def _wait(self, is_there: Callable[[], bool]) -> None:
        while not is_there():
            time.sleep(POLL)

    # --- ending together --------------------------------------------------------------------------

    def _beat(self) -> None:
        """Beat, watch the next process, and end this one where another has failed."""
        store, watched = self._heart_store, (self.rank + 1) % self.size
        watch = Watch(store, watched, self._place, MISSED)
        while not self._leaving.wait(BEAT):
            try:
                store.add(f"beats/{self.rank}", 1)
                if store.check(["failed"]):
                    self._unsaid.acquire(blocking=False)  # the reason has been said
                    store.add("n_heard", int(not self.is_main))
                    break
                if watch.misses():
                    self._speaks_first(gone(watched), self._say)
                    break
            except RuntimeError:
                if not self._leaving.is_set() and self._speaks_without_store():
                    self._say(gone(0))
                break
        self._is_out.set()
        if not self._ending.wait(GRACE):
            os._exit(STATUS)

    def _speaks_first(self, reason: str, say: Callable[[str], None] | None = None) -> bool:
        """Say in the store that the processes have failed; whether nobody has said so before.

        say: what says it to people. Who hears of it in the store ends in silence, this process's
        own main thread too, so that it must have been said by then.
        """
        if self._heart_store.add("n_failed", 1) > 1:
            return False
        if say is not None:
            say(reason)
        self._heart_store.set("failed", reason)
        until = time.monotonic() + HEARD
        while self.is_main and time.monotonic() < until:  # the store ends with this process
            if self._heart_store.add("n_heard", 0) >= self.size - 1:
                break
            time.sleep(POLL)
        return True

    def _speaks_without_store(self) -> bool:
        """The same where the store is gone, with the process that held it."""
        return self.rank == 1 and self._unsaid.acquire(blocking=False)

    def _say(self, reason: str) -> None:
        name = sys.argv[0].rsplit("/", 1)[-1]
        with contextlib.suppress(OSError):
            os.write(2, f"{name}: error: {reason}\n".encode(errors="replace"))

    def _missing(self) -> int | None:
        """A process that is no more, None where all of them are there."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        watches = {rank: Watch(self._store, rank, self._place, LOOK) for rank in others}
        until = time.monotonic() + LOOK + BEAT
        while time.monotonic() < until:
            for rank, watch in watches.items():
                if watch.misses():
                    return rank
            time.sleep(POLL)
        return None

    def failed(self, error: BaseException) -> BaseException:
        """What this process ends with: the first one that fails says why, the others nothing."""
        if isinstance(error, SystemExit):
            return error
        told_to_stop = isinstance(error, Interrupted | KeyboardInterrupt)
        status = 128 + getattr(error, "signum", signal.SIGINT) if told_to_stop else STATUS
        silent = SystemExit(status)
        try:
            if getattr(error, "agreed", False):  # all of them end so
                return error if self._speaks_first(str(error)) else silent
            reason = f"rank {self.rank} of {self.size}: {first_line(error)}"
            if not isinstance(error, UserError | KeyboardInterrupt):
                # A launcher that has lost one process stops the others; collectives fail in them.
                time.sleep(2 * POLL)
                if self._store.check(["failed"]):
                    return silent
                missing = self._missing()
                if missing is not None:
                    reason = gone(missing)
                elif not told_to_stop:  # a defect of the program
                    self.note("".join(traceback.format_exception(error)))
            if not self._speaks_first(reason):
                return silent
        except RuntimeError:
            return UserError(gone(0)) if self._speaks_without_store() else silent
        return Interrupted(status - 128, reason) if told_to_stop else UserError(reason)

    def leave(self) -> None:
        """Say that this process has done its part."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
        self._ending.set()
        self.leave_store()
        if self._connected:
            dist.destroy_process_group()

    def leave_store(self) -> None:
        """Have the heart in the store no more; it still ends a process that does not end by itself.

        A thread that is in the store when the interpreter ends would abort the process.
        """
        self._leaving.set()
        self._is_out.wait(GRACE)


class Watch:
    """Looks whether another process is still there.

    Args:
        place: of this process.
        patience: seconds after which one of another machine that does not beat is missed.
    """

    def __init__(self, store: dist.Store, rank: int, place: str, patience: float):
        self._store, self._rank, self._place, self._patience = store, rank, place, patience
        self._count, self._since = -1, time.monotonic()

    def misses(self) -> bool:
        """Whether it is no more, and has not said that it leaves."""
        if self._store.check([f"left/{self._rank}"]):
            return False
        count = self._store.add(f"beats/{self._rank}", 0)
        if not count:  # it is only starting
            return False
        ended = self._has_ended_here()
        if ended is not None:
            return ended
        if count != self._count:
            self._count, self._since = count, time.monotonic()
        return time.monotonic() - self._since > self._patience

    def _has_ended_here(self) -> bool | None:
        """Whether it has ended, as this machine says; None where it is one of another."""
        machine, _, number = self._store.get(f"place/{self._rank}").decode().rpartition(" ")
        return has_ended(int(number)) if self._place.startswith(f"{machine} ") else None


def place() -> str:
    """This process's machine, as far as it sees other processes of it, and its number there."""
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return f"{socket.gethostname()} {space} {os.getpid()}"


def has_ended(number: int) -> bool | None:
    """Whether the process of this number has ended; None where that cannot be seen."""
    try:
        stat = Path(f"/proc/{number}/stat").read_bytes()
    except FileNotFoundError:
        return True if Path("/proc/self/stat").exists() else None
    except OSError:
        return None
    return stat.rpartition(b")")[2].split()[0] in (b"Z", b"X")


def gone(rank: int) -> str:
    """The reason of all others where a process was killed."""
    return f"rank {rank} is gone: it was killed, or its machine is lost"


def first_line(error: BaseException) -> str:
    """What an error says, in one line; with its kind, where it is no user's error."""
    words = str(error).strip().split("\n")[0]
    if isinstance(error, UserError | Interrupted):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


@contextmanager
def joined_group() -> Iterator[ProcessGroup]:
    """The processes that were started together, from here to the end of the command."""
    group = ProcessGroup()
    try:
        yield group
    except BaseException as error:
        try:
            if isinstance(error, SystemExit) and not error.code:
                raise
            raise group.failed(error) from error
        finally:
            group.leave_store()
    else:
        group.leave()
