"""RequireLogin: pages, their WebSocket, files and /mlflow are for those alone who have logged in; /login and /logout.

Everything asks for a login but the probes, the login page, and what is opened by a secret of its own (``/quire``; whoever an API
key was found for, whose Principal stands in the scope already). So a route that is added later is closed. An open WebSocket ends
within a second when its session does.

Boundary: ASGI around `workbench.access.logins`. Host and Origin were checked before (``workbench.api.origin``).
"""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs, quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workbench.access.logins import Headers, Logins, Visitor
from workbench.access.principal import SCOPE_KEY, Right
from workbench.access.users import User
from workbench.api.errors import ForbiddenError, UnauthorizedError, error_response
from workbench.api.login_page import login_page, logout_page, own_path
from workbench.errors import WorkbenchError

OPEN = frozenset({"/healthz", "/health", "/readyz"})
API = (
    "/v1",
    "/v2",
    "/rerank",
    "/tokenize",
    "/detokenize",
    "/drain",
    "/resume",
)  # for keys alone: a cookie goes along unasked
MAX_FORM_BYTES = 8192
_MAX_WAITING = 32  # passwords that wait to be hashed
_WATCH_S = 1.0
_SAFE = ("GET", "HEAD", "OPTIONS")


class RequireLogin:
    """ASGI middleware. `logins` must be open when the first request comes."""

    def __init__(self, app: ASGIApp, logins: Logins) -> None:
        self.app = app
        self._logins = logins
        self._hashing = ThreadPoolExecutor(2, "quire-login")  # each takes 32 MiB and a core
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        scope["headers"] = self._believed(scope)
        path, is_http = scope["path"], scope["type"] == "http"
        if path in OPEN or path.startswith("/quire/") or SCOPE_KEY in scope:
            await self.app(scope, receive, send)
            return
        visitor = self._logins.visitor(_texts(scope))
        if is_http and path in ("/login", "/logout"):
            await (await self._own_page(Request(scope, receive), visitor))(scope, receive, send)
            return
        refusal = _refusal(scope, visitor)
        if refusal is not None or visitor is None:
            await _refuse(refusal or UnauthorizedError("log in first"), scope, receive, send)
            return
        scope[SCOPE_KEY] = visitor.principal
        if is_http:
            await self.app(scope, receive, send)
        else:
            await self._watched(scope, receive, send)

    def _believed(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The headers without a user's name that no trusted proxy has sent."""
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        name = self._logins.user_header.encode()
        if not name or self._logins.is_proxy(_peer(scope)):
            return headers
        return [header for header in headers if header[0] != name]

    async def _own_page(self, request: Request, visitor: Visitor | None) -> Response:
        if request.method in ("GET", "HEAD"):
            if request.url.path == "/login":
                return self._form(following=own_path(request.query_params.get("next", "/")))
            if visitor is None:
                return RedirectResponse("/login", 303)
            return logout_page(visitor.principal.id.partition(":")[2], visitor.session_id is not None)
        if request.method != "POST":
            return Response(status_code=405, headers={"allow": "GET, POST"})
        if "origin" not in request.headers:  # every browser sends it; ours it is, or it had been refused
            return error_response(ForbiddenError("a login form brings an Origin header", param="origin"))
        try:
            return await (
                self._log_in(request) if request.url.path == "/login" else self._log_out(request, visitor)
            )
        except WorkbenchError as error:
            return error_response(error)

    async def _log_in(self, request: Request) -> Response:
        form = await _form_of(request)
        user, password, following = (
            form.get("user", ""),
            form.get("password", ""),
            own_path(form.get("next", "/")),
        )
        logins, throttle = self._logins, self._logins.throttle
        peer = logins.client_of(_peer(request.scope), _texts(request.scope))
        wait_s = throttle.wait_s(user, peer)
        if wait_s > 0 or self._waiting >= _MAX_WAITING:
            after = str(math.ceil(max(wait_s, 1)))
            told = f"Too many tries. Try again in {after} s."
            return self._form(user, following, told, 429, {"retry-after": after})
        throttle.tried(user, peer)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._hashing, logins.users.verify, user, password)
        finally:
            self._waiting -= 1
        if found is None:
            return self._form(user, following, "The name or the password is wrong.", 401)
        throttle.succeeded(user, peer)
        return await self._begin(request, found, following)

    async def _begin(self, request: Request, user: User, following: str) -> Response:
        """A new session in place of the browser's old one, and the way back to what was asked for. Raises StoreError."""
        logins, seconds = self._logins, self._logins.settings.session_hours * 3600
        assert logins.sessions is not None, "opened by the app's services"
        old = logins.visitor(_texts(request.scope))
        if old is not None and old.session_id is not None:
            await asyncio.to_thread(logins.sessions.end, old.session_id)
        session_id = await asyncio.to_thread(logins.sessions.begin, user.name, user.stamp, seconds)
        response = RedirectResponse(following, 303, {"cache-control": "no-store"})
        response.set_cookie(
            logins.cookie, session_id, max_age=int(seconds), httponly=True, samesite="lax", secure=self._is_https(request.scope)
        )  # fmt: skip
        return response

    async def _log_out(self, request: Request, visitor: Visitor | None) -> Response:
        response = RedirectResponse("/login", 303, {"cache-control": "no-store"})
        if visitor is not None and visitor.session_id is not None:
            assert self._logins.sessions is not None
            await asyncio.to_thread(self._logins.sessions.end, visitor.session_id)
        response.delete_cookie(self._logins.cookie, httponly=True, samesite="lax")
        return response

    def _form(
        self, user: str = "", following: str = "/", problem: str = "", status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> Response:  # fmt: skip
        has_passwords = self._logins.users.path.exists()
        return login_page(
            user=user, following=following, problem=problem, password=has_passwords, status=status, headers=headers
        )  # fmt: skip

    def _is_https(self, scope: Scope) -> bool:
        """Whether the browser speaks TLS, to us or to the trusted proxy before us."""
        told = [value for name, value in _texts(scope) if name == "x-forwarded-proto"]
        return scope.get("scheme") == "https" or (told == ["https"] and self._logins.is_proxy(_peer(scope)))

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run a WebSocket until it ends or its session does."""
        headers, over = list(_texts(scope)), asyncio.Event()

        async def watched_receive() -> Message:
            message, ended = asyncio.ensure_future(receive()), asyncio.ensure_future(over.wait())
            try:
                await asyncio.wait((message, ended), return_when=asyncio.FIRST_COMPLETED)
                return {"type": "websocket.disconnect", "code": 1008} if over.is_set() else message.result()
            finally:
                message.cancel()
                ended.cancel()

        async def watched_send(message: Message) -> None:
            if not over.is_set():
                await send(message)

        task = asyncio.ensure_future(self.app(scope, watched_receive, watched_send))
        try:
            while not (await asyncio.wait((task,), timeout=_WATCH_S))[0]:
                if not over.is_set() and self._logins.visitor(headers) is None:
                    over.set()
                    await send({"type": "websocket.close", "code": 1008, "reason": "logged out"})
            await task
        finally:
            task.cancel()


def _refusal(scope: Scope, visitor: Visitor | None) -> UnauthorizedError | ForbiddenError | None:
    """Why this request is not answered; None: it is."""
    path = scope["path"]
    if any(path == each or path.startswith(each + "/") for each in API):
        return UnauthorizedError(
            "an API key is needed", param="authorization", limit="Authorization: Bearer KEY",
            remedy="Make one with `quire keys create`.",
        )  # fmt: skip
    if visitor is None:
        return UnauthorizedError("log in first", remedy="Open /login in a browser.")
    needed = _right_of(scope)
    if not visitor.principal.may(needed):
        return ForbiddenError(
            f"{visitor.principal.id} lacks the right {needed.value!r}", value=scope["path"], limit=needed.value,
            remedy="Ask an administrator of this server.",
        )  # fmt: skip
    return None


def _right_of(scope: Scope) -> Right:
    """MLflow's API moves aliases and deletes runs: what does not only read there is for administrators."""
    method, path = scope.get("method", "GET"), scope["path"].rstrip("/")
    if not (path + "/").startswith("/mlflow/") or method in _SAFE:
        return Right.READ
    last = path.rpartition("/")[2]
    reads = last.startswith(("search", "get", "batch-get", "batchGet")) or last in (
        "graphql",
        "metrics",
        "query",
    )
    return Right.READ if method == "POST" and reads else Right.ADMIN


async def _refuse(error: WorkbenchError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": "log in first"})
            return
        response = error_response(error)
        await send(
            {"type": "websocket.http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )  # fmt: skip
        await send({"type": "websocket.http.response.body", "body": response.body})
        return
    request = Request(scope)
    is_page = request.method == "GET" and "text/html" in request.headers.get("accept", "")
    if isinstance(error, UnauthorizedError) and error.param != "authorization" and is_page:
        query = scope["query_string"].decode("latin-1")
        asked = own_path(scope["path"] + (f"?{query}" if query else ""))
        await RedirectResponse(f"/login?next={quote(asked, safe='')}", 303)(scope, receive, send)
        return
    response = error_response(error)
    if response.status_code == 401:
        response.headers["www-authenticate"] = "Bearer"
    await response(scope, receive, send)


async def _form_of(request: Request) -> dict[str, str]:
    """A login form's fields. Raises UnauthorizedError, ForbiddenError."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_FORM_BYTES:
                raise ForbiddenError("the form is too large", limit=MAX_FORM_BYTES)
    except ClientDisconnect:
        raise ForbiddenError("the form did not come whole") from None
    try:
        fields = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=8, errors="strict")
    except ValueError:
        raise ForbiddenError("the form cannot be read", limit="application/x-www-form-urlencoded") from None
    return {name: values[0] for name, values in fields.items()}


def _texts(scope: Scope) -> Headers:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else ""
