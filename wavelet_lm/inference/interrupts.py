"""Ctrl-C while text is written."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from wavelet_lm.errors import ONE_STOP


@contextmanager
def ctrl_c_as_flag() -> Iterator[list[int]]:
    """A list that Ctrl-C makes non-empty, so that no token is cut in two; a later one raises."""
    pressed: list[int] = []
    first = 0.0

    def note(signum: int, frame: object) -> None:
        nonlocal first
        if not pressed:
            pressed.append(signum)
            first = time.monotonic()
        elif time.monotonic() - first > ONE_STOP:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
