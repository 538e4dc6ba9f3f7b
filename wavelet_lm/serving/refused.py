"""Requests that are not answered as they were meant."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A request is refused, with a status of HTTP and one line that says why.

    Attributes:
        param: the field of the request that is at fault, where it is one.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, retry_after: int | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.retry_after = status, param, retry_after

    def body(self) -> dict[str, Any]:
        """The object that says so."""
        return {
            "error": {
                "message": str(self),
                "type": "invalid_request_error" if self.status < 500 else "server_error",
                "param": self.param,
                "code": None,
            }
        }
