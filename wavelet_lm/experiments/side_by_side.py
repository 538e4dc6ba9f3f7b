"""Runs side by side, each in a process of its own and on a device of its own."""

import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch

from wavelet_lm.devices import resolve_device
from wavelet_lm.environment import available_cpus
from wavelet_lm.errors import UserError

RUN_FOLDER = re.compile(r"^run folder (.+)$", re.MULTILINE)  # the first line of a run's log


class Ended(NamedTuple):
    """How a run ended: its number, exit status, folder (None before it has one), last words."""

    number: int
    status: int
    run: Path | None
    words: str


def read_devices(text: str) -> list[str]:
    """The devices of `--devices`: names apart by commas, as often as runs share them, or `all`.

    Raises:
        UserError: a device that is not there, or `all` without a GPU.
    """
    if text == "all":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if n == 0:
            raise UserError("--devices all means every CUDA GPU and there is none; try cpu,cpu")
        return [f"cuda:{i}" for i in range(n)]
    devices = [name.strip() for name in text.split(",")]
    for name in devices:
        resolve_device(name)
    return devices


def threads_each(devices: Sequence[str]) -> int:
    """Threads of a run, where as many as there are devices share the CPUs."""
    return max(1, available_cpus() // len(devices))


class SideBySide:
    """Runs commands, one on each device at a time; `next_end` gives each one's end as it comes.

    Args:
        commands: arguments of Python for each run, in the order in which they begin.
        devices: one for each run at a time, whose command gets `--device` with it.
        output: folder in which a file for each run keeps what it says.
    """

    def __init__(self, commands: Sequence[Sequence[str]], devices: Sequence[str], output: Path):
        self.commands, self.output = commands, output
        self._waiting = list(range(len(commands)))
        self._running: dict[int, subprocess.Popen] = {}
        self._lock = threading.Lock()
        self._ends: SimpleQueue[Ended | None] = SimpleQueue()
        self._n_working = len(devices)
        for device in devices:
            threading.Thread(target=self._work, args=(device,)).start()

    def next_end(self) -> Ended | None:
        """Wait for the next end; None when there is none to come."""
        while self._n_working:
            ended = self._ends.get()
            if ended is not None:
                return ended
            self._n_working -= 1
        return None

    def stop(self, signum: int) -> list[int]:
        """Signal every run, whose ends are still to come; the numbers of those not begun."""
        with self._lock:
            left, self._waiting = self._waiting, []
            for process in self._running.values():
                process.send_signal(signum)
        return left

    def log_of(self, number: int) -> Path:
        """The file that keeps what a run says."""
        return self.output / f"run_{number + 1}.log"

    def _work(self, device: str) -> None:
        """Run one command after the other on a device, until none is left."""
        while (begun := self._begin(device)) is not None:
            number, process = begun
            status = process.wait()
            with self._lock:
                del self._running[number]
            said = self.log_of(number).read_text(encoding="utf-8", errors="replace").strip()
            folder = RUN_FOLDER.search(said)
            words = said.rpartition("\n")[2].rpartition(": error: ")[2]
            self._ends.put(Ended(number, status, Path(folder[1]) if folder else None, words))
        self._ends.put(None)

    def _begin(self, device: str) -> tuple[int, subprocess.Popen] | None:
        with self._lock:
            if not self._waiting:
                return None
            number = self._waiting.pop(0)
            words = [sys.executable, *self.commands[number], "--device", device]
            with self.log_of(number).open("wb") as log:
                process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
            self._running[number] = process
            return number, process
