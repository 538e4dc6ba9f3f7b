"""Answers to clients that may leave before they are there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class EventStream(Response):
    """Events as they come, to a client that may leave at any of them.

    events: what is sent at once, and whether it is the last.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[tuple[bytes, bool]], leave: contextlib.AsyncExitStack):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._leave = events, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._leave:
            await _first_of(self._send(send), _until_left(receive))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for part, is_last in self._events:
            await send({"type": "http.response.body", "body": part, "more_body": not is_last})


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, answer: Awaitable[Response]) -> Response:
    """An answer, unless the client leaves before it is there."""
    response = await _first_of(answer, _until_left(request.receive))
    return Response(status_code=499) if response is None else response


async def _first_of(work: Awaitable[Any], other: Awaitable[Any]) -> Any:
    """What `work` gives, or None where `other` ends before it; the one that is left is ended."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
