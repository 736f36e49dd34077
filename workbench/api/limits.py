"""Limits: what every request is held to before anything reads it: headers, one meaning of its length, a body that comes in time.

A body may take `SLOW_BODY_S` and then must have come at `MIN_BODY_BYTES_S` on average, so that a large upload may last and a trickle
may not. How large a body may be is each route's (``workbench.api.intake``).

Boundary: ASGI. Bytes before a request's head is whole are ``workbench.api.http_protocol``'s.
"""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workbench.api.errors import HeadersTooLargeError, SlowBodyError, error_response
from workbench.errors import ApiError

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 << 10  # all of them, and the address
SLOW_BODY_S = 20.0
MIN_BODY_BYTES_S = 4096


class AmbiguousLengthError(ApiError):
    """Headers that two servers could read as two different ends of the body."""

    code = "ambiguous_length"


class Limits:
    """ASGI middleware, in front of everything. `slow_body_s`: what any body may take."""

    def __init__(self, app: ASGIApp, slow_body_s: float = SLOW_BODY_S) -> None:
        self.app = app
        self._slow_body_s = slow_body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = _refusal(scope)
        if refusal is not None:
            await _end(refusal, scope, receive, send)
            return
        began, size, is_whole, has_started = time.monotonic(), 0, False, False

        async def timely() -> Message:
            nonlocal size, is_whole
            if is_whole:
                return await receive()  # the client leaves: that may take as long as the answer
            due_s = began + self._slow_body_s + size / MIN_BODY_BYTES_S - time.monotonic()
            try:
                async with asyncio.timeout(due_s):
                    message = await receive()
            except TimeoutError:
                raise SlowBodyError(
                    f"the body came too slowly: {size} bytes in {time.monotonic() - began:.0f} s", value=size,
                    limit=f"{self._slow_body_s:g} s, then {MIN_BODY_BYTES_S} bytes a second",
                ) from None  # fmt: skip
            size += len(message.get("body", b""))
            is_whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def noted(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self.app(scope, timely, noted)
        except SlowBodyError as error:
            if has_started:
                raise
            await _end(error, scope, receive, send)


def _refusal(scope: Scope) -> ApiError | None:
    headers = scope["headers"]
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        return HeadersTooLargeError(
            f"{len(headers)} headers and address have {size} bytes", value=size,
            limit=f"{MAX_HEADERS} headers, {MAX_HEADER_BYTES} bytes",
        )  # fmt: skip
    lengths = [value for name, value in headers if name in (b"content-length", b"transfer-encoding")]
    if len(lengths) > 1:
        return AmbiguousLengthError(
            "more than one of Content-Length and Transfer-Encoding", param="content-length"
        )
    return None


async def _end(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    response = error_response(error)
    response.headers["connection"] = "close"  # what is left of the body is not the next request
    await response(scope, receive, send)
