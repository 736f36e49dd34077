"""RequestContext: what is known of the HTTP request that is being served, for its log lines, its row in the log, and its trace.

A context variable, so that it need not be handed through every call; tasks and threads that a request starts inherit it. The
middleware of ``workbench.api.http_metrics`` begins one for each request; whoever learns something writes it there.

Boundary: values of one request. Nothing here decides or counts.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass

MAX_ID_CHARS = 256  # of a user, session or traceparent: longer ones are cut, when written and when looked for
ORIGIN_COLUMNS = ("user", "session", "principal", "operation", "traceparent")


@dataclass(slots=True)
class RequestContext:
    """One request as far as it is known. The fields of ORIGIN_COLUMNS are columns of the request log."""

    request_id: str | None = None
    user: str | None = None  # the end user, as the caller names them
    session: str | None = None  # the caller's conversation: header x-session-id, or metadata.session_id
    principal: str | None = None  # whose key or login it came with
    operation: str | None = None  # of OpenTelemetry's gen_ai.operation.name
    traceparent: str | None = None  # W3C trace context of the caller
    refusal: str | None = None  # code of the typed error that it was answered with

    def origin(self) -> dict[str, str]:
        """What the request log keeps of it; empty where nothing is known."""
        known = ((name, getattr(self, name)) for name in ORIGIN_COLUMNS)
        return {name: short_id(value) for name, value in known if value}


_CURRENT: ContextVar[RequestContext | None] = ContextVar("quire_request", default=None)


def begin() -> Token[RequestContext | None]:
    """Start a request's context; give the token to `end`."""
    return _CURRENT.set(RequestContext())


def end(token: Token[RequestContext | None]) -> None:
    _CURRENT.reset(token)


def current() -> RequestContext:
    """The context of the request that is being served; one of no request elsewhere."""
    return _CURRENT.get() or RequestContext()


def short_id(value: str) -> str:
    """An identifier in the one form that is stored and compared."""
    return value[:MAX_ID_CHARS].encode("utf-8", "replace").decode()
