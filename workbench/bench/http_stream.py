"""One streamed chat completion over HTTP, read so cheaply that a thousand tokens a second cost the reader little.

Every token of every stream passes here, on the same few cores that the server computes on; a general HTTP client spends more
on a chunk than the server does. So: asyncio's protocol interface and httptools (uvicorn's parser), the clock read once for
each packet, before anything is parsed.

Connections are kept and used again, as OpenAI's clients do. A kept connection that the server closed meanwhile is replaced by
a new one, once, and only if nothing of the answer had come.

Boundary: the wire of POST /chat/completions with stream=true. What a benchmark makes of it is `driver`'s.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are ``time.monotonic_ns()``."""

    sent_ns: int = 0
    event_ns: list[int] = field(default_factory=list)  # when each event that adds to the answer was read
    finish_ns: int | None = None  # when the end of the text was told
    end_ns: int = 0
    status: int | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    error: str | None = None  # a reason that can be counted; None: it went well


class StreamClient:
    """Sends requests to one OpenAI-compatible base URL, such as ``http://127.0.0.1:8501/v1``.

    `first_event_is_token`: the server's first event comes with the first token, even if that has no text of its own yet;
    others send one ahead that says only who speaks.
    """

    def __init__(
        self, base_url: str, headers: Mapping[str, str], *, first_event_is_token: bool = False
    ) -> None:
        parts = urlsplit(base_url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._first_event_is_token = first_event_is_token
        head = [f"POST {parts.path.rstrip('/')}/chat/completions HTTP/1.1", f"Host: {parts.netloc}"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        head += ["Content-Type: application/json", "Accept: text/event-stream"]
        self._head = "\r\n".join(head).encode("latin-1")
        self._idle: list[_Connection] = []

    async def chat(self, body: Mapping[str, Any], request_id: str, timeout_s: float) -> Answer:
        """Send and read to the end. Every failure is the answer's `error`; a cancelled call raises CancelledError."""
        content = json.dumps(body, separators=(",", ":")).encode()
        request = self._head + (
            f"\r\nX-Request-Id: {request_id}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
        )
        answer = Answer(sent_ns=time.monotonic_ns())
        try:
            async with asyncio.timeout(timeout_s):
                connection, was_kept = await self._connection()
                if await connection.ask(request, answer, self._first_event_is_token):
                    return self._keep(connection, answer)
                if was_kept and answer.status is None and answer.error is None:  # closed while it was idle
                    connection = await self._connect()
                    answer = Answer(sent_ns=time.monotonic_ns())
                    if await connection.ask(request, answer, self._first_event_is_token):
                        return self._keep(connection, answer)
            answer.error = answer.error or "connection closed"
        except TimeoutError:
            answer.error = "timeout"
        except ssl.SSLError as error:
            answer.error = f"TLS: {error.reason}"
        except OSError as error:
            answer.error = (
                "connection refused"
                if isinstance(error, ConnectionRefusedError)
                else f"{error.strerror or error}"
            )
        answer.end_ns = time.monotonic_ns()
        return answer

    def close(self) -> None:
        """Close the kept connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connection(self) -> tuple[_Connection, bool]:
        while self._idle:
            kept = self._idle.pop()
            if kept.is_open:
                return kept, True
        return await self._connect(), False

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return connection

    def _keep(self, connection: _Connection, answer: Answer) -> Answer:
        if connection.is_open:
            self._idle.append(connection)
        return answer


class _Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[bool] | None = None
        self._answer = Answer()
        self._parser: Any = None
        self._buffer = b""
        self._is_stream = False
        self._now_ns = 0
        self._first_counts = False
        self.is_open = False

    async def ask(self, request: bytes, answer: Answer, first_event_is_token: bool) -> bool:
        """Send, read; whether a whole answer came."""
        assert self._transport is not None
        self._answer, self._buffer, self._is_stream = answer, b"", False
        self._first_counts = first_event_is_token
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        answer.sent_ns = time.monotonic_ns()
        self._transport.write(request)
        try:
            return await self._done
        except (
            BaseException
        ):  # cancelled or out of time: the server sees the connection go and ends the request
            self.close()
            raise

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    # ── asyncio calls these ─────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._now_ns = time.monotonic_ns()
        if self._done is None or self._done.done():
            return self.close()  # nobody asked
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._answer.error = f"not HTTP: {error}"
            self._end(False)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._end(False)

    # ── httptools calls these ───────────────────────────────────────────────────────────────────────────────────────

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._is_stream = value.lower().startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self._is_stream:
            self._buffer += body
            return
        lines = (self._buffer + body if self._buffer else body).split(b"\n")
        self._buffer = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip())

    def on_message_complete(self) -> None:
        answer = self._answer
        answer.end_ns = self._now_ns
        if answer.status != 200:
            answer.error = f"HTTP {answer.status}: {_message(self._buffer)}"
        elif not self._is_stream:
            answer.error = "not a stream"
        elif answer.error is None and answer.finish_ns is None:
            answer.error = "stream ended early"
        if not self._parser.should_keep_alive():
            self.close()
        self._end(True)

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            return
        answer = self._answer
        try:
            event = json.loads(data)
            if event.get("error"):
                answer.error = f"stream error: {_message(data)}"
            if event.get("usage"):
                answer.usage = event["usage"]
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                if self._first_counts or _adds(delta):
                    answer.event_ns.append(self._now_ns)
                    self._first_counts = False
                if choice.get("finish_reason"):
                    answer.finish_reason = choice["finish_reason"]
                    answer.finish_ns = self._now_ns
        except (ValueError, AttributeError, TypeError):
            answer.error = f"not an event: {data[:80]!r}"

    def _end(self, whole: bool) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(whole)
        if not whole:
            self.close()


def _adds(delta: Mapping[str, Any]) -> bool:
    """Whether the event carries something that the model wrote."""
    return bool(
        delta.get("content")
        or delta.get("reasoning_content")
        or delta.get("reasoning")
        or delta.get("tool_calls")
    )


def _message(body: bytes) -> str:
    """The error's code or text, short enough to be counted by."""
    try:
        error = json.loads(body)["error"]
        text = error if isinstance(error, str) else error.get("code") or error.get("message") or ""
        return str(text)[:120]
    except (ValueError, LookupError, AttributeError, TypeError):
        return body[:80].decode(errors="replace").strip()
