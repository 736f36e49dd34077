"""Requests of a routed name, sent on to the endpoint that has room, and to the next one where that fails before its first byte.

What was begun is never begun twice for the client: once a byte of an answer was passed on, a lost instance is told as an error in
the stream. A client that leaves is left by the instance too. The answer is the instance's own, its model's name included; the
header ``x-quire-instance`` tells which one it was.

Without routes none of this is in the way of a request. Boundary: HTTP. The choice is ``workbench.fleet.router``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from math import ceil
from typing import Any

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import EngineError
from workbench.api.disconnect import ClientGone, unless_gone
from workbench.api.errors import error_body, error_response
from workbench.api.intake import read_json, take_request_id
from workbench.api.timeout import HEADER as TIMEOUT
from workbench.api.timeout import take_timeout
from workbench.backends.discovery import client_of
from workbench.backends.endpoints import Endpoint, Endpoints
from workbench.errors import NotReadyError, WorkbenchError
from workbench.fleet.router import Router, prefix_of
from workbench.fleet.routes import Route, Target
from workbench.fleet.status import TIMEOUT as STATUS_TIMEOUT
from workbench.fleet.status import read_status

PATHS = ("/chat/completions", "/completions", "/responses", "/embeddings")
ROUTED, INSTANCE = "x-quire-routed", "x-quire-instance"
READ_EVERY_S = 1.0
IDLE_S = 30.0  # after which the endpoints of routes that nobody uses are not read any more
_TIMEOUT = httpx.Timeout(600.0, connect=2.0)
_ELSEWHERE = (429, 502, 503, 504)  # refused before any work, or nobody there
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=256)
log = logging.getLogger(__name__)


class InstanceLostError(NotReadyError):
    """The instance that answered broke off in the middle of its answer."""

    code = "instance_lost"


class Forwarder:
    """ASGI middleware below /v1: requests of routed names go elsewhere, all others on to `app`."""

    def __init__(
        self, app: ASGIApp, routes: Sequence[Route], endpoints: Callable[[], Endpoints], max_body_bytes: int
    ) -> None:
        self._app = app
        self._router = Router(routes)
        self._fleet = _Fleet(self._router, endpoints)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_theirs = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(PATHS)
        if not is_theirs or any(name == ROUTED.encode() for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        kept: list[Message] = []

        async def keeping() -> Message:
            kept.append(await receive())
            return kept[-1]

        async def again() -> Message:
            return kept.pop(0) if kept else await receive()

        request = Request(scope, keeping)
        try:
            body = await read_json(request, self._max_body_bytes)
        except ClientDisconnect:
            return
        except WorkbenchError:
            body = None  # the app below says what is wrong
        name = body.get("model") if isinstance(body, dict) else None
        route = self._router.routes.get(name) if isinstance(name, str) else None
        if route is None:
            await self._app(scope, again, send)
            return
        request_id = take_request_id(request)
        try:
            timeout_s = take_timeout(request)
            await unless_gone(
                Request(scope, receive),
                self._forward(route, body, request_id, timeout_s, scope["path"], send),
            )
        except ClientGone:
            return
        except (EngineError, WorkbenchError) as error:
            await error_response(error, request_id)(scope, receive, send)

    async def _forward(
        self,
        route: Route,
        body: dict[str, Any],
        request_id: str,
        timeout_s: float | None,
        path: str,
        send: Send,
    ) -> None:
        """Try the route's targets in order, as long as the client has time.

        Raises NoInstanceError, or what the last one refused with, before any byte.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        await self._fleet.fresh()
        sub_path = next(each for each in PATHS if path.endswith(each))
        prefix = prefix_of(_text_of(body))
        refused: httpx.Response | None = None
        for target in self._router.order(route, prefix):
            self._router.began(target, prefix)
            headers = {"x-request-id": request_id}
            if until is not None:
                headers[TIMEOUT] = str(max(1, ceil((until - time.monotonic()) * 1000)))
            try:
                async with self._fleet.ask(target, sub_path, body, headers) as answer:
                    if answer.status_code in _ELSEWHERE:
                        await answer.aread()
                        refused = answer
                        if until is not None and time.monotonic() >= until:
                            break  # it is the client whose time is over: nothing is wrong with the instance
                        self._router.failed(target.endpoint, f"answered {answer.status_code}")
                        continue
                    await self._pass_on(answer, target, send)
                    return
            except _NotBegunError as error:
                log.info("%s: %s is tried no further: %s", request_id, target, error)
                self._router.failed(target.endpoint, str(error))
            finally:
                self._router.ended(target)
        if refused is not None:
            await _send_whole(send, refused, await refused.aread(), None)
            return
        self._router.order(route, prefix)  # raises where all have become unusable meanwhile
        raise InstanceLostError(
            f"none of {route.name}'s instances answers", value=[str(t) for t in route.targets], param="model",
            remedy="Send it again in some seconds.",
        )  # fmt: skip

    async def _pass_on(self, answer: httpx.Response, target: Target, send: Send) -> None:
        """The answer to the client. Raises _NotBegunError while nothing of it was sent."""
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            try:
                content = await answer.aread()
            except httpx.HTTPError as error:
                raise _NotBegunError(f"{type(error).__name__}: {error}") from error
            await _send_whole(send, answer, content, target)
            return
        pieces = answer.aiter_bytes()
        try:
            first = await anext(pieces, b"")
        except httpx.HTTPError as error:
            raise _NotBegunError(f"{type(error).__name__}: {error}") from error
        await send(
            {"type": "http.response.start", "status": answer.status_code, "headers": _headers(answer, target)}
        )
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.HTTPError as error:
            self._router.failed(target.endpoint, f"broke off ({type(error).__name__})")
            lost = InstanceLostError(
                f"{target} broke off in the middle of the answer", value=str(target),
                remedy="Send the request again; what has come is not the whole answer.",
            )  # fmt: skip
            await send({"type": "http.response.body", "body": _error_event(lost), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class _NotBegunError(Exception):
    """An instance gave no byte of an answer."""


class _Fleet:
    """The connections to a router's endpoints, and its readings of them. Lives on one event loop."""

    def __init__(self, router: Router, endpoints: Callable[[], Endpoints]) -> None:
        self._router = router
        self._endpoints = endpoints
        self._by_name: dict[str, Endpoint] = {}
        self._status_clients: dict[Endpoint, httpx.Client] = {}
        self._client: httpx.AsyncClient | None = None
        self._used_at = 0.0
        self._reading: asyncio.Task[None] | None = None

    async def fresh(self) -> None:
        """See that readings are taken; waits for the first one alone."""
        self._used_at = time.monotonic()
        if self._reading is None or self._reading.done():
            await self._read_all()
            if self._reading is None or self._reading.done():  # nobody else came meanwhile
                self._reading = asyncio.create_task(self._read_on(), name="quire-fleet")

    @contextlib.asynccontextmanager
    async def ask(
        self, target: Target, path: str, body: dict[str, Any], passed_on: dict[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """Send a request; its answer's head. Raises _NotBegunError."""
        endpoint = self._by_name.get(target.endpoint)
        if endpoint is None:
            raise _NotBegunError(f"there is no endpoint {target.endpoint!r}")
        if self._client is None:
            self._client = httpx.AsyncClient(
                timeout=_TIMEOUT, follow_redirects=False, trust_env=False, limits=_LIMITS
            )
        try:
            headers = {
                **endpoint.headers(),
                **passed_on,
                ROUTED: "1",
                "accept-encoding": "identity",
            }
            outgoing = self._client.build_request(
                "POST",
                endpoint.address(path, target.model),
                headers=headers,
                json={**body, "model": target.model},
            )
            answer = await self._client.send(outgoing, stream=True)
        except (httpx.HTTPError, WorkbenchError) as error:
            raise _NotBegunError(f"{type(error).__name__}: {error}") from error
        try:
            yield answer
        finally:
            await answer.aclose()

    async def _read_on(self) -> None:
        """Until the loop ends, which cancels it; the connections end with it."""
        try:
            while True:
                await asyncio.sleep(READ_EVERY_S)
                if time.monotonic() - self._used_at < IDLE_S:
                    await self._read_all()
        finally:
            for client in self._status_clients.values():
                client.close()
            if self._client is not None:
                await self._client.aclose()

    async def _read_all(self) -> None:
        try:
            known = await asyncio.to_thread(lambda: self._endpoints().list())
        except WorkbenchError as error:
            log.warning("the endpoints could not be read: %s", error)
            return
        self._by_name = {each.name: each for each in known}
        await asyncio.gather(*(self._read(name) for name in self._router.endpoints))

    async def _read(self, name: str) -> None:
        endpoint = self._by_name.get(name)
        if endpoint is None:
            self._router.failed(name, "no such endpoint")
            return
        try:
            if endpoint not in self._status_clients:
                self._status_clients[endpoint] = client_of(endpoint, STATUS_TIMEOUT)
            client = self._status_clients[endpoint]
            self._router.told(name, await asyncio.to_thread(read_status, endpoint, client))
        except WorkbenchError as error:
            self._router.failed(name, error.message)


async def _send_whole(send: Send, answer: httpx.Response, content: bytes, target: Target | None) -> None:
    headers = [*_headers(answer, target), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _headers(answer: httpx.Response, target: Target | None) -> list[tuple[bytes, bytes]]:
    kept = ("content-type", "cache-control", "x-accel-buffering", "x-request-id", "retry-after")
    own = [(INSTANCE, target.endpoint)] if target is not None else []
    found = [(name, answer.headers[name]) for name in kept if name in answer.headers] + own
    return [(name.encode(), value.encode("latin-1", "replace")) for name, value in found]


def _error_event(error: WorkbenchError) -> bytes:
    return b"data: " + json.dumps(error_body(error, 503)).encode() + b"\n\n"


def _text_of(body: dict[str, Any]) -> str:
    """What a prompt begins with, whatever the form of the request."""
    told = body.get("messages") or body.get("prompt") or body.get("input") or ""
    return told if isinstance(told, str) else json.dumps([body.get("tools"), told], ensure_ascii=False)
