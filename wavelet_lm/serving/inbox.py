"""From the scheduler's thread to the requests on the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Mailroom:
    """Carries what a thread says to inboxes on an event loop, all of it in one call of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._letters: deque[tuple[Inbox, Any]] = deque()
        self._called = False

    def send(self, inbox: Inbox, letter: Any) -> None:
        """From any thread."""
        self._letters.append((inbox, letter))
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before anything is taken: what comes later calls again
        while self._letters:
            inbox, letter = self._letters.popleft()
            inbox.put(letter)


class Inbox:
    """What came for one request and was not read yet."""

    def __init__(self) -> None:
        self._letters: list[Any] = []
        self._something = asyncio.Event()

    def put(self, letter: Any) -> None:
        """On the event loop."""
        self._letters.append(letter)
        self._something.set()

    async def take(self) -> list[Any]:
        """All there is, one letter at least."""
        await self._something.wait()
        self._something.clear()
        letters, self._letters = self._letters, []
        return letters
