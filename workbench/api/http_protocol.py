"""BoundedHttp: uvicorn's HTTP protocol with a deadline and a size for what comes before a request is one.

A connection that says nothing, or sends a header a byte at a time, reaches no application and would stay open for ever: it is
closed when its head is not whole in time or too large. What follows the head is bounded by ``workbench.api.limits``.

Boundary: bytes of a request's head on one connection.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
_ANSWER = (
    b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
)


class BoundedHttp(HttpToolsProtocol):
    """For uvicorn's ``http=``. `head_s`: how long a head may take."""

    head_s = 15.0

    _deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_whole()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._deadline is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large", b"The request's headers are too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_is_whole()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._head_bytes = 0
            told = b"The request's headers took too long."
            self._deadline = self.loop.call_later(self.head_s, self._refuse, b"408 Request Timeout", told)

    def _head_is_whole(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed as HTTP."""
        self._refuse(b"400 Bad Request", msg.encode())

    def _refuse(self, status: bytes, told: bytes, *_: Any) -> None:
        self._head_is_whole()
        if not self.transport.is_closing():
            error = {
                "message": told.decode(),
                "type": "invalid_request_error",
                "param": None,
                "code": "invalid_http",
            }
            body = json.dumps({"error": error}).encode()
            self.transport.write(_ANSWER % (status, len(body), body))
            self.transport.close()
