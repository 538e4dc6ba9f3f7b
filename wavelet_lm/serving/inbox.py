"""From the scheduler's thread to the requests on the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Mailroom:
    """Carries what a thread says to inboxes on an event loop, all of it in one call of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._letters: deque[tuple[Inbox, Any, bool]] = deque()
        self._called = False

    def send(self, inbox: Inbox, letter: Any, urgent: bool) -> None:
        """From any thread; urgent: as `Inbox.put`."""
        self._letters.append((inbox, letter, urgent))
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before anything is taken: what comes later calls again
        while self._letters:
            inbox, letter, urgent = self._letters.popleft()
            inbox.put(letter, urgent)


class Inbox:
    """What came for one request and was not read yet."""

    def __init__(self) -> None:
        self._letters: list[Any] = []
        self._something = asyncio.Event()
        self._urgent = False
        self._rest: asyncio.Future[None] | None = None

    def put(self, letter: Any, urgent: bool) -> None:
        """On the event loop; urgent: whoever rests takes it at once."""
        self._letters.append(letter)
        self._something.set()
        if urgent:
            self._urgent = True
            _end(self._rest)

    async def rest(self, seconds: float) -> None:
        """Let letters gather for so long, or until one is urgent."""
        if self._urgent or not seconds:
            return
        loop = asyncio.get_running_loop()
        self._rest = loop.create_future()
        timer = loop.call_later(seconds, _end, self._rest)
        try:
            await self._rest
        finally:
            timer.cancel()
            self._rest = None

    async def take(self) -> list[Any]:
        """All there is, one letter at least."""
        await self._something.wait()
        self._something.clear()
        self._urgent = False
        letters, self._letters = self._letters, []
        return letters


def _end(rest: asyncio.Future[None] | None) -> None:
    if rest is not None and not rest.done():
        rest.set_result(None)
