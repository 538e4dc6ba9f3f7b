"""Signals that end a loop between two of its steps."""

import signal
import time
from typing import Any

from wavelet_lm.errors import ONE_STOP, Interrupted


class StopSignals:
    """As a context: Ctrl-C, SIGTERM and SIGHUP are noted; a later one stops at once.

    A terminal that closes hangs up, unless `nohup` has had that ignored.

    Attributes:
        received: the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signals = (signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,)))
        self._previous = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if not self.received:
            self.received, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > ONE_STOP:
            raise Interrupted(number, "stopped at once, without saving")
