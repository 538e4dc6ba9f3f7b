"""What requests bring, within bounds, and what is answered where they are refused."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from wavelet_lm.errors import UserError
from wavelet_lm.json_files import parse_json
from wavelet_lm.serving.refused import Refused

# Seconds in which a request's body has to come.
BODY_SECONDS = 30.0


async def read_json(request: Request, limit: int) -> Any:
    """The JSON that a request brings, of at most `limit` bytes.

    Raises:
        Refused: as `read_body`, or it is none.
    """
    body = await read_body(request, limit)
    try:
        return parse_json(body.decode("utf-8"), "the request")
    except UnicodeDecodeError as error:
        raise Refused(400, f"the request is not UTF-8 at byte {error.start}") from None
    except UserError as error:
        raise Refused(400, str(error)) from None


async def read_body(request: Request, limit: int) -> bytes:
    """What a request brings.

    Raises:
        Refused: it is larger, or does not come in time.
    """
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > limit:
        raise _too_large(limit)

    async def read() -> bytes:
        parts, n = [], 0
        async for part in request.stream():
            parts.append(part)
            n += len(part)
            if n > limit:
                raise _too_large(limit)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, f"the request did not come within {BODY_SECONDS:g} s") from None


def refusal(refused: Refused) -> Response:
    """The answer that says so."""
    headers = {}
    if refused.retry_after is not None:
        headers["retry-after"] = str(refused.retry_after)
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refused.status in (408, 413):  # what is left of the request is not read
        headers["connection"] = "close"
    return JSONResponse(refused.body(), refused.status, headers)


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the request is larger than the {limit:,} bytes that are allowed")
