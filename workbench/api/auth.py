"""API keys in front of the API: who asks, whether they may, and how much they still may. One table says which right a route needs.

Keys are asked for as soon as one was made, or where QUIRE_REQUIRE_KEY says so; until then everybody who reaches the server is its
owner. The app's own token (``HOME_DIR/run/app.json``) opens everything, as a key with ADMIN does.

Boundary: headers of HTTP requests to the API. Pages, their WebSocket and /mlflow are behind the login, the probes behind nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workbench.access.acting import acting_as
from workbench.access.keys import TEXT_PREFIX, ApiKey
from workbench.access.limits import KeyMeter, KeyUse, using
from workbench.access.principal import OWNER, SCOPE_KEY, Principal, Right
from workbench.api.errors import InvalidApiKeyError, MissingRightError, error_response
from workbench.errors import WorkbenchError
from workbench.store import utc_now

if TYPE_CHECKING:
    from workbench.access.key_ring import KeyRing
    from workbench.services import Services

_INFER, _ADMIN = (Right.INFER,), (Right.ADMIN,)
_LOOK = (Right.READ, Right.INFER)  # what clients that ask models want to see first
# The rights of which a route needs one. A path below the API that is not here needs ADMIN.
RIGHTS: Mapping[str, tuple[Right, ...]] = {
    "/v1/chat/completions": _INFER,
    "/v1/completions": _INFER,
    "/v1/responses": _INFER,
    "/v1/embeddings": _INFER,
    "/v1/rerank": _INFER,
    "/v1/score": _INFER,
    "/v1/feedback": _INFER,
    "/v1/models": _LOOK,
    "/rerank": _INFER,
    "/v2/rerank": _INFER,
    "/tokenize": _INFER,
    "/detokenize": _INFER,
    "/openapi.json": _LOOK,
    "/metrics": (Right.READ,),
    "/load": _LOOK,
    "/drain": _ADMIN,
    "/resume": _ADMIN,
    "/v1/load_lora_adapter": _ADMIN,
    "/v1/unload_lora_adapter": _ADMIN,
}
_MODELS = "/v1/models/"
_INTERNAL = "/quire/"
_IS_KEY = f"Bearer {TEXT_PREFIX}".lower().encode()


def rights_for(path: str) -> tuple[Right, ...] | None:
    """The rights of which a path needs one; None: it is not the API's, or a probe's."""
    found = RIGHTS.get(path)
    if found is not None or not (path == "/v1" or path.startswith(("/v1/", _INTERNAL))):
        return found
    return _LOOK if path.startswith(_MODELS) else _ADMIN


def may_administer(scope: Scope) -> bool:
    """Whether a key with ADMIN came with this request; it is never so where nobody asked for one."""
    found = scope.get(SCOPE_KEY)
    return (
        isinstance(found, Principal) and found.may(Right.ADMIN) and _header(scope).lower().startswith(_IS_KEY)
    )


class RequireKey:
    """ASGI middleware: 401 or 403 in OpenAI's form, or the request goes on with its Principal in the scope.

    `token`: the app's own. `is_required`: also before a key was made. Without services there is no store that could hold keys.
    """

    def __init__(self, app: ASGIApp, *, services: Services | None, token: str, is_required: bool) -> None:
        self._app = app
        self._services = services
        self._token = token.encode()
        self._is_required = is_required

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed = rights_for(scope["path"]) if scope["type"] == "http" else None
        ring = self._services.keys if self._services is not None else None
        if needed is None or (ring is None and not self._is_required):
            await self._app(scope, receive, send)
            return
        given = _bearer(scope)
        try:
            if ring is not None and ring.needs_reading():
                await ring.read_again()
            key = self._key(scope["path"], given, needed, ring)
        except WorkbenchError as error:
            await error_response(error)(scope, receive, send)
            return
        if isinstance(key, ApiKey):
            assert ring is not None
            await self._run(key, ring.meter, needed is _INFER, scope, receive, send)
            return
        if key is not None:
            scope[SCOPE_KEY] = key
        await self._app(scope, receive, send)

    def _key(
        self, path: str, given: str, needed: tuple[Right, ...], ring: KeyRing | None
    ) -> ApiKey | Principal | None:
        """Who asks: a key, the holder of the app's token, or None where nobody is asked who they are.

        Raises:
            InvalidApiKeyError, MissingRightError
        """
        if given and secrets.compare_digest(given.encode(), self._token):
            return OWNER
        is_internal = path.startswith(_INTERNAL)
        if is_internal and not given.startswith(TEXT_PREFIX):
            return None  # the internal routes ask for their token themselves
        if not self._is_required and not is_internal and (ring is None or not ring.any_key()):
            return None
        key = ring.find(given) if ring is not None and given else None
        if key is None or not key.is_valid(utc_now()):
            raise _invalid(given, key)
        if not any(key.principal.may(right) for right in needed):
            raise MissingRightError(
                f"{key.id} may not do this: it has the rights {', '.join(key.rights)}", value=key.rights,
                limit=[right.value for right in needed], param="authorization",
                remedy=f"Use a key with the right {' or '.join(right.value for right in needed)}.",
            )  # fmt: skip
        return key

    async def _run(
        self, key: ApiKey, meter: KeyMeter, counts: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """The request of a key, which `counts` against its limits or not."""
        scope[SCOPE_KEY] = key.principal
        with acting_as(key.principal):
            if not counts:
                await self._app(scope, receive, send)
                return
            try:
                meter.enter(key)
            except WorkbenchError as error:
                await error_response(error)(scope, receive, _with_limits(send, key, meter))
                return
            try:
                with using(KeyUse(key, meter)):
                    await self._app(scope, receive, _with_limits(send, key, meter))
            finally:
                meter.leave(key)


def _with_limits(send: Send, key: ApiKey, meter: KeyMeter) -> Send:
    """`send` that adds the headers of the key's rates; itself where it has none."""
    if not key.limits:
        return send

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *meter.headers(key)]}
        await send(message)

    return sending


def _invalid(given: str, key: ApiKey | None) -> InvalidApiKeyError:
    if not given:
        told = "this server asks for an API key"
    elif key is None:
        told = "the API key is not known here"
    else:
        told = f"{key.id} was revoked" if key.revoked_at is not None else f"{key.id} has expired"
    return InvalidApiKeyError(
        told, param="authorization", limit="Authorization: Bearer KEY",
        remedy="Make one with `quire keys create`, and give it as the client's api_key.",
    )  # fmt: skip


def _bearer(scope: Scope) -> str:
    """The request's key or token; "" where it brings none."""
    scheme, _, given = _header(scope).partition(b" ")
    return given.strip().decode("latin-1") if scheme.lower() == b"bearer" else ""


def _header(scope: Scope) -> bytes:
    return next((bytes(value) for name, value in scope.get("headers", ()) if name == b"authorization"), b"")
