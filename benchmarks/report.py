"""What the benchmarks share: clocks, the speed of memory, tables and the files they write."""

import argparse
import itertools
import mmap
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from wavelet_lm.experiments.results import check_plot as check_plot
from wavelet_lm.experiments.results import check_targets as check_targets
from wavelet_lm.experiments.results import write_results as write_results
from wavelet_lm.training.memory_estimate import GiB

# A tensor that no cache holds, small enough for two of them to fit.
BANDWIDTH_BYTES = {"cpu": GiB, "cuda": 4 * GiB}
BANDWIDTH_REPEATS = 7

Key = TypeVar("Key", bound=Hashable)


class Clock:
    """Seconds of the stretches inside `running`.

    Args:
        now: seconds since whenever; None = of the process on a CPU, of the wall on a GPU.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] | None = None):
        self.device, self.seconds = device, 0.0
        self._now = now or (time.process_time if device.type == "cpu" else time.perf_counter)

    @contextmanager
    def running(self) -> Iterator[None]:
        started = self._now()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += self._now() - started


def step_seconds(step: Callable[[], object], n: int, device: torch.device) -> list[float]:
    """How long each of n calls takes, one right after the other, as the device sees it.

    On a GPU the host never waits between the calls: events on the stream mark where each ends.
    """
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]
    marks = [time.perf_counter()]
    for _ in range(n):
        step()
        marks.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(marks)]


def alternate(
    measurements: Mapping[Key, Callable[[], list[float]]], repeats: int
) -> dict[Key, list[float]]:
    """All samples of every measurement, taken in turns, every other time in reverse order.

    So a machine that gets slower or faster on the way does so for all of them alike.
    """
    samples: dict[Key, list[float]] = {key: [] for key in measurements}
    for repeat in range(repeats):
        for key in list(measurements)[:: -1 if repeat % 2 else 1]:
            samples[key] += measurements[key]()
    return samples


def bandwidth(device: torch.device, n_bytes: int | None = None) -> dict[str, float]:
    """Bytes per second of `copy_` (read and written counted) and of reading alone (a float32 sum).

    Medians over repeats on tensors of `n_bytes`, which no cache should hold. On a CPU an ordinary
    store fetches the line that it overwrites, which `copy` does not count: a program that only
    reads, as decoding nearly does, can therefore run above 1 of it.
    """
    n_bytes = n_bytes or BANDWIDTH_BYTES[device.type]
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    steps = {"copy": lambda: target.copy_(source), "read": source.sum}
    for step in steps.values():
        step()
    samples = alternate(
        {name: lambda step=step: step_seconds(step, 1, device) for name, step in steps.items()},
        BANDWIDTH_REPEATS,
    )
    return {
        "copy": 2 * n_bytes / median(samples["copy"]),
        "read": n_bytes / median(samples["read"]),
    }


def median(values: Sequence[float]) -> float:
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def resident_bytes(device: torch.device) -> int | None:
    """Memory now: of the GPU's allocator, or this process's in RAM; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return None


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns, the first to the left, the others to the right; None is a dash."""
    cells = [list(head)] + [["–" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(w)}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in cells
    )


# --- arguments -----------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0)


def positives(text: str) -> tuple[int, ...]:
    """Whole numbers from 1, separated by commas; sorted, each once."""
    return tuple(sorted({positive(part) for part in text.split(",")}))


def naturals(text: str) -> tuple[int, ...]:
    """Whole numbers from 0, separated by commas; sorted, each once."""
    return tuple(sorted({natural(part) for part in text.split(",")}))


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return value
