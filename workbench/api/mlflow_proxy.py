"""/mlflow/*: MLflow under our own origin, so that one forwarded port carries pages, API and MLflow's UI.

A streaming reverse proxy: bodies pass through in pieces, both ways and as they are encoded; headers that belong to one
connection stay on it (RFC 9110, section 7.6.1). The other server sees its own address as Host and Origin: that the request
came from our origin was checked before (``workbench.api.origin``).

Boundary: HTTP to one server. No caching, no WebSocket, no login of its own.
"""

from __future__ import annotations

import html
from collections.abc import AsyncIterator, Iterable
from urllib.parse import unquote, urlsplit

import httpx
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from workbench.api.errors import error_response
from workbench.errors import ApiError, NotReadyError, WorkbenchError

PREFIX = "/mlflow"
_HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_TIMEOUT = httpx.Timeout(300.0, connect=5.0)
_RETRY_S = 2


class MlflowDownError(NotReadyError):
    """MLflow does not answer: it is starting, or has been stopped."""

    code = "mlflow_not_ready"


class MlflowProxyError(WorkbenchError):
    """MLflow broke off while it answered."""

    code = "mlflow_failed"


class MlflowProxy:
    """ASGI app, to be mounted at /mlflow. `target` is MLflow's address as its clients use it; close it with `aclose`."""

    def __init__(self, target: str) -> None:
        self.target = target.rstrip("/")
        self._origin = "{0.scheme}://{0.netloc}".format(urlsplit(self.target))
        self._client: httpx.AsyncClient | None = None  # made on the event loop that it belongs to

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003, "reason": "no web sockets here"})
            return
        request = Request(scope, receive)
        try:
            upstream = await self._ask(request)
        except ClientDisconnect:
            return
        except _Refused as refused:
            await refused.response(scope, receive, send)
            return
        try:
            await self._pass_on(upstream, send)
        finally:
            await upstream.aclose()

    async def aclose(self) -> None:
        """Close the connections. A second call does nothing."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _ask(self, request: Request) -> httpx.Response:
        """Send the request on; the response, its body not yet read."""
        if not self.target.startswith(("http://", "https://")):
            raise _Refused(self._down(request, f"its tracking URI {self.target!r} is no web address"))
        if ".." in unquote(request.url.path).replace("\\", "/").split("/"):
            told = "a path below /mlflow leads out of it"
            raise _Refused(error_response(ApiError(told, value=request.url.path)))
        if self._client is None:
            self._client = httpx.AsyncClient(
                timeout=_TIMEOUT, follow_redirects=False, trust_env=False, headers={"accept-encoding": "identity"}
            )  # fmt: skip
        body = request.stream() if _has_body(request.headers) else None
        outgoing = self._client.build_request(
            request.method, self._url(request), headers=self._request_headers(request), content=body
        )
        try:
            return await self._client.send(outgoing, stream=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Refused(self._down(request, f"nothing answers at {self.target}")) from error
        except httpx.HTTPError as error:
            problem = MlflowProxyError(
                f"MLflow at {self.target} broke off ({type(error).__name__}: {error})", value=self.target,
                remedy="Try again; its log is HOME_DIR/logs/mlflow.log.",
            )  # fmt: skip
            raise _Refused(error_response(problem)) from error

    async def _pass_on(self, upstream: httpx.Response, send: Send) -> None:
        headers = [
            (name, self._own_location(value) if name.lower() == b"location" else value)
            for name, value in _end_to_end(upstream.headers.raw)
            if name.lower() not in (b"date", b"server")  # our server writes its own
        ]
        await send({"type": "http.response.start", "status": upstream.status_code, "headers": headers})
        async for piece in _pieces(upstream):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _url(self, request: Request) -> str:
        """The same address at the other server, with the path's escapes as they came."""
        raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
        path = raw.partition(b"?")[0].decode("ascii", "replace").removeprefix(PREFIX)
        query = request.scope["query_string"].decode("latin-1")
        return f"{self.target}{path}" + (f"?{query}" if query else "")

    def _request_headers(self, request: Request) -> list[tuple[bytes, bytes]]:
        given = request.headers
        kept = [
            (name, _without_login(value) if name.lower() == b"cookie" else value)
            for name, value in _end_to_end(given.raw)
            if name.lower() not in (b"host", b"origin", b"referer", b"expect", b"forwarded")
            and not name.lower().startswith(b"x-forwarded-")
        ]
        if "origin" in given:
            kept.append((b"origin", self._origin.encode()))
        host = given.get("host", "")
        return [
            *kept,
            (b"x-forwarded-host", host.encode()),
            (b"x-forwarded-proto", request.url.scheme.encode()),
        ]

    def _own_location(self, value: bytes) -> bytes:
        """A redirect to the other server's address leads here."""
        text = value.decode("latin-1")
        if text.startswith(self.target):
            return f"{PREFIX}{text.removeprefix(self.target)}".encode("latin-1")
        return text.removeprefix(self._origin).encode("latin-1") or b"/"

    def _down(self, request: Request, reason: str) -> Response:
        error = MlflowDownError(
            f"MLflow is not there: {reason}", value=self.target, param="MLFLOW_TRACKING_URI",
            remedy="It starts some seconds after the app; see HOME_DIR/logs/mlflow.log if it stays away.",
        )  # fmt: skip
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            page = _WAITING.format(text=html.escape(str(error)))
            return HTMLResponse(page, 503, {"refresh": str(_RETRY_S), "retry-after": str(_RETRY_S)})
        return error_response(error)


class _Refused(Exception):
    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


_WAITING = (
    "<!doctype html><title>MLflow is starting</title><p>{text}</p><p>This page tries again by itself.</p>"
)


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers without those of one connection, named by the standard or by the Connection header."""
    given = list(headers)
    named = {
        part.strip().lower()
        for name, value in given
        if name.lower() == b"connection"
        for part in value.decode("latin-1").split(",")
    }
    dropped = _HOP_BY_HOP | named
    return [(name, value) for name, value in given if name.decode("latin-1").lower() not in dropped]


def _without_login(cookies: bytes) -> bytes:
    """The cookies without our own login, which may be a key to more than MLflow."""
    kept = [part for part in cookies.split(b";") if not part.strip().startswith(b"quire_session_")]
    return b";".join(kept).strip()


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


async def _pieces(upstream: httpx.Response) -> AsyncIterator[bytes]:
    """The body as it came, still encoded. A server that breaks off ends our answer short: its length tells the client."""
    try:
        async for piece in upstream.aiter_raw():
            yield piece
    except httpx.HTTPError as error:
        raise ConnectionError(f"MLflow broke off: {error}") from error
