"""A server in a process of its own, asked over HTTP without any library in between.

The client must take little: it shares the machine with the server that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from wavelet_lm.errors import UserError

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def served(run: str, *options: str) -> Iterator[Server]:
    """A server of a run, in a process of its own.

    Raises:
        UserError: it did not start.
    """
    command = [sys.executable, "-m", "wavelet_lm.serving", run, "--port", "0", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if " at http://" in line:
                break
        else:
            raise UserError(f"the server did not start: {''.join(lines[-1:]).strip()}")
        yield Server(process, int(line.split("://")[1].split()[0].rpartition(":")[2]))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stderr.close()


class Server:
    """A server that is running, asked without any library in between."""

    def __init__(self, process: subprocess.Popen, port: int):
        self._process, self._port = process, port

    def resident(self) -> int:
        """Bytes of memory that it has."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    def cpu_seconds(self) -> float:
        """What its threads have computed so far, in steps of 10 ms."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        ticks = stat.rpartition(")")[2].split()[11:13]  # in user mode, and in the kernel
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    async def events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """What comes of a stream, as it comes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(request_of("POST", "/v1/completions", {**body, "stream": True}, close=True))
        while part := await reader.read(1 << 16):
            yield part
        writer.close()

    async def text(self, body: dict[str, Any]) -> str:
        """A text that is streamed.

        Raises:
            UserError: it was refused.
        """
        return streamed_text(b"".join([part async for part in self.events(body)]))

    async def ask(self, asked: list[tuple[str, str, dict[str, Any] | None]]) -> list[Any]:
        """Requests one after the other on one connection; their answers.

        Raises:
            UserError: one was refused.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        answers = []
        for method, path, body in asked:
            writer.write(request_of(method, path, body))
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = int(head.partition("content-length:")[2].split()[0])
            answers.append(json.loads(await reader.readexactly(length)))
            if "error" in answers[-1]:
                raise UserError(f"{path}: {answers[-1]['error']['message']}")
        writer.close()
        return answers


def request_of(method: str, path: str, body: dict[str, Any] | None, close: bool = False) -> bytes:
    """A request as it is sent."""
    content = b"" if body is None else json.dumps(body).encode()
    last = "Connection: close\r\n" * close
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\n{last}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def streamed_text(received: bytes) -> str:
    """The text in the events of a stream.

    Raises:
        UserError: an event is an error.
    """
    text = []
    for line in received.splitlines():
        at = line.find(b'{"')
        if line.startswith(b"data: {") or b'{"error"' in line:
            event = json.loads(line[at:])
            if "error" in event:
                raise UserError(f"a stream failed: {event['error']['message']}")
            text += [choice["text"] for choice in event["choices"]]
    return "".join(text)
