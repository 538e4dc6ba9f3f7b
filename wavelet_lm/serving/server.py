"""The server's process: a socket, the event loop, and an end in good order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from wavelet_lm.errors import UserError
from wavelet_lm.serving.service import Service

# Seconds in which a new connection has to bring its first request's head, and those that a kept
# one may be idle.
HEAD_SECONDS, IDLE_SECONDS = 15.0, 30
# Seconds in which a client has to take what waits for it, some 48 KiB.
TAKE_SECONDS = 30.0
# Seconds that answers have to end in when the server does.
GRACE_SECONDS = 20
# Bytes that a request's head may have.
MOST_HEAD = 65536
# Connections beside those of the most streams: for health, pages and refusals.
MORE_CONNECTIONS = 256


class Protocol(HttpToolsProtocol):
    """HTTP/1.1 that does not wait for ever, and takes nonsense amid an answer calmly."""

    _hurry: asyncio.TimerHandle | None = None  # while a request's head is waited for
    _full: asyncio.TimerHandle | None = None  # while nothing more can be sent
    _in_head, _head = True, 0  # bytes of a head that came, up to what belongs to the next one

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._hurry = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        self._head += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._head > MOST_HEAD:
            self.send_400_response("The head of the request is too long.")
        elif self.cycle is not None and not self.cycle.response_complete:
            self._hurry = _cancelled(self._hurry)
        elif self._hurry is None:  # a further request begins
            self._hurry = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head = True, 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._full = self.loop.call_later(TAKE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._full = _cancelled(self._full)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._hurry, self._full = _cancelled(self._hurry), _cancelled(self._full)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.cycle is None or self.cycle.response_complete:
            super().send_400_response(msg)
        else:  # an answer is on its way already
            self.transport.close()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(uvicorn.Server):
    """A server that ends what is written before it waits for the end of answers."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End."""
        self._service.stop()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: no address ({error})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise UserError(
            f"--host {host} --port {port}: cannot be listened at ({error.strerror or error}); give"
            " another --port"
        ) from None
    return listener


def make_server(app: Starlette, service: Service) -> Server:
    """The server of an application; `run(sockets=[…])` runs it."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        limit_concurrency=service.limits.max_streams + MORE_CONNECTIONS,
    )
    return Server(config, service)


def run(
    app: Starlette, service: Service, listener: socket.socket, log: Callable[[str], object]
) -> None:
    """Serve until a signal ends it.

    Raises:
        KeyboardInterrupt, Interrupted: the signal, once everything is in order.
    """
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log(f"serving {service.name} at http://{shown}:{port} (Ctrl-C ends)")
    make_server(app, service).run(sockets=[listener])
