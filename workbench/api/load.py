"""/load, /drain and /resume: how much room this instance has, for whoever spreads requests over several, and taking it out of turn.

GET /load reads counters that are there already: cheap enough for every second. Room is told in slots, tokens and blocks, not as
utilisation: a server whose cache is full of what can be evicted is as free as an empty one.

Drained, an instance takes no more requests under /v1 and beside it; those that run end as they would, pages and models stay, and
/resume takes it all back. /readyz then says no, so that a balancer in front sends its requests elsewhere.

Boundary: HTTP. Which engines there are is the host's and the metrics'; who may drain is ``workbench.access``'s.
Source of the name: vLLM's /load, whose ``server_load`` is kept.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from workbench.access.principal import Right, principal_of
from workbench.api.errors import ForbiddenError, error_response, json_response
from workbench.api.metrics import EngineMetrics
from workbench.errors import ServerStoppingError
from workbench.host import EngineHost

_STILL_TAKEN = ("/feedback", "/load_lora_adapter", "/unload_lora_adapter")


class LoadAnswer(BaseModel):
    """Sums over the engines of this process."""

    server_load: int  # requests that run or wait
    running: int
    waiting: int
    waiting_tokens: int
    max_num_seqs: int  # slots
    num_blocks: int
    free_blocks: int
    block_size: int | None  # None: no engine, or of several sizes
    ready: bool  # a request would be answered now
    draining: bool
    phase: str
    message: str
    models: list[str]  # that answer here, the default first
    version: str


class DrainAnswer(BaseModel):
    status: Literal["draining", "serving"]
    server_load: int  # requests that still run or wait


class LoadRoutes:
    """The handlers, with what they need."""

    def __init__(self, host: EngineHost, metrics: EngineMetrics) -> None:
        self._host = host
        self._metrics = metrics

    async def load(self, request: Request) -> Response:
        """GET /load."""
        return json_response(self._load().model_dump(), headers={"cache-control": "no-store"})

    async def drain(self, request: Request) -> Response:
        """POST /drain: take no more requests until /resume."""
        return self._set(request, draining=True)

    async def resume(self, request: Request) -> Response:
        """POST /resume: take requests again."""
        return self._set(request, draining=False)

    def _set(self, request: Request, *, draining: bool) -> Response:
        asker = principal_of(request.scope)
        if not asker.may(Right.ADMIN):
            raise ForbiddenError(
                f"{request.url.path} needs the right {Right.ADMIN}", value=asker.id, limit=Right.ADMIN,
                remedy="Use a key that has it.",
            )  # fmt: skip
        self._host.is_draining = draining
        told = DrainAnswer(status="draining" if draining else "serving", server_load=self._load().server_load)
        return json_response(told.model_dump())

    def _load(self) -> LoadAnswer:
        engines = [worker.stats() for worker in self._metrics.engines()]
        state, running = self._host.state(), sum(each.num_running for each in engines)
        waiting = sum(each.num_waiting for each in engines)
        sizes = {each.block_size for each in engines}
        served = [each.id for each in self._host.resident() if each.state.ready]
        return LoadAnswer(
            server_load=running + waiting,
            running=running,
            waiting=waiting,
            waiting_tokens=sum(each.num_waiting_tokens for each in engines),
            max_num_seqs=sum(each.max_num_seqs for each in engines),
            num_blocks=sum(each.num_blocks for each in engines),
            free_blocks=sum(each.num_free_blocks for each in engines),
            block_size=sizes.pop() if len(sizes) == 1 else None,
            ready=bool(served) and not self._host.is_stopping and not self._host.is_draining,
            draining=self._host.is_draining or self._host.is_stopping,
            phase=state.phase.value,
            message=state.message,
            models=[*served, *(self._host.splits if served else ())],
            version=_version(),
        )


class DrainGate:
    """ASGI: 503 with Retry-After for new requests while the host drains."""

    def __init__(self, app: ASGIApp, host: EngineHost) -> None:
        self._app = app
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_request = scope["type"] == "http" and scope["method"] == "POST"
        if not (self._host.is_draining and is_request) or scope["path"].endswith(_STILL_TAKEN):
            await self._app(scope, receive, send)
            return
        error = ServerStoppingError(
            "this instance is drained and takes no more requests until it is resumed",
            remedy="Send it to another instance, or again later.",
        )
        await error_response(error)(scope, receive, send)


@cache
def _version() -> str:
    try:
        return importlib.metadata.version("quire")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return ""
