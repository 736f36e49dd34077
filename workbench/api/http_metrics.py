"""What HTTP requests came to: counts by route and status and by the reason of refusals, and each request's context begun.

Labels are bounded: routes of the API by name, everything else by the room that answers it, so that no client can make series.

Boundary: an ASGI middleware around the whole app, and what it counted. What a refusal is called is the typed error's `code`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workbench.api.errors import PATHS
from workbench.observe import request_context

_KNOWN_PATHS = frozenset((*PATHS, "/healthz", "/health", "/readyz", "/metrics"))
_ROOMS = ("/v1/models/", "/v1", "/quire", "/mlflow")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_UNANSWERED = 499  # the client left before there was a status, as nginx has it


class HttpMetrics:
    """Counts since start. Written and read on the event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str]] = Counter()  # by method, route and status
        self.refused: Counter[str] = Counter()  # by code

    def families(self, prefix: str) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            f"{prefix}http_requests", "HTTP requests", labels=("method", "route", "status")
        )
        for labels, count in self.requests.items():
            requests.add_metric(labels, count)
        refused = CounterMetricFamily(
            f"{prefix}http_requests_refused", "HTTP requests refused or failed, by the error's code", labels=("reason",)
        )  # fmt: skip
        for reason, count in self.refused.items():
            refused.add_metric([reason], count)
        yield requests
        yield refused


class ObservedRequests:
    """ASGI middleware: begins each HTTP request's context and counts what became of it. To stand outside all others."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        token = request_context.begin()
        try:
            await self.app(scope, receive, told)
        except Exception:
            status = status or 500  # what the server tells the client then
            raise
        finally:
            refusal = request_context.current().refusal
            request_context.end(token)
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            self._metrics.requests[method, route_of(scope["path"]), str(status or _UNANSWERED)] += 1
            if refusal is not None:
                self._metrics.refused[refusal] += 1


def route_of(path: str) -> str:
    """The route of a path as a label: one of a fixed set, whatever the path."""
    if path in _KNOWN_PATHS:
        return path
    return next((room.rstrip("/") + "/*" for room in _ROOMS if path.startswith(room)), "pages")
