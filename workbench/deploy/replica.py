"""EngineReplica: one replica of a Ray Serve deployment: an EngineHost of its own behind Quire's API, called in process.

What `quire serve` does with a socket, this does with calls: the gateway's request goes through the same ASGI app. A replica
keeps no request log and runs no jobs: those are the workbench's.

Boundary: the life of one replica. Imports no Ray: Ray wraps the class.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, cast
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.types import Message, Scope

from workbench import settings as settings_module
from workbench.deploy.autoscaling import METRIC
from workbench.deploy.wire import AnswerStart, HttpRequest

_END = object()


class EngineReplica:
    """Made by Ray with the settings of `quire serve`, as environment variables."""

    async def __init__(self, environment: dict[str, str]) -> None:  # type: ignore[misc]  # Ray awaits it
        from workbench import app
        from workbench.host import HostPhase
        from workbench.logs import configure_logging

        os.environ.update(environment)
        settings = settings_module.load(follow="", demo=False)
        settings_module.prepare_home(settings)
        configure_logging(settings.log_level, settings.log_format)
        wiring = replace(app.wire(settings), services=None)
        self._host = wiring.host
        self._app = cast(Starlette, app.build_api_app(wiring))
        self._open = AsyncExitStack()
        await self._open.enter_async_context(self._app.router.lifespan_context(self._app))
        state = await asyncio.to_thread(self._host.wait)
        if state.phase is not HostPhase.READY:
            await self._open.aclose()
            raise RuntimeError(f"the model could not be loaded: {state.message}")

    async def forward(self, request: HttpRequest) -> AsyncIterator[AnswerStart | bytes]:
        """The app's answer: an event stream as it comes, anything else in one. Left early, the request is aborted."""
        messages: asyncio.Queue[Message | object] = asyncio.Queue(
            maxsize=16
        )  # a slow reader slows the stream down
        gone = asyncio.Event()
        call = asyncio.create_task(self._call(request, messages, gone))
        try:
            start = await _next(messages, call)
            headers = tuple(
                (name.decode("latin-1"), value.decode("latin-1")) for name, value in start["headers"]
            )
            if dict(headers).get("content-type", "").startswith("text/event-stream"):
                yield AnswerStart(start["status"], headers, is_stream=True)
                async for part in _parts(messages, call):
                    yield part
            else:
                body = b"".join([part async for part in _parts(messages, call)])
                yield AnswerStart(start["status"], headers, body)
        finally:
            gone.set()
            call.cancel()

    async def check_health(self) -> None:
        """Ray replaces a replica whose engine is dead. Raises EngineDeadError, NotReadyError."""
        from engine.errors import EngineDeadError
        from engine.records import HealthState

        health = self._host.worker().health()
        if health.state is HealthState.DEAD:
            raise EngineDeadError("the engine of this replica is dead")

    def record_routing_stats(self) -> dict[str, int]:
        """For the router: requests here, rows, and tokens that wait for one."""
        stats = self._host.worker().stats()
        return {
            "num_requests": stats.num_running + stats.num_waiting,
            "num_slots": stats.max_num_seqs,
            "num_waiting_tokens": stats.num_waiting_tokens,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For the autoscaling policy."""
        return {METRIC: float(self._host.worker().stats().num_waiting_tokens)}

    def __del__(self) -> None:  # Ray calls it when the replica is to go
        host = getattr(self, "_host", None)
        if host is not None:
            host.close()

    async def _call(
        self, request: HttpRequest, messages: asyncio.Queue[Message | object], gone: asyncio.Event
    ) -> None:
        """Run the app; its messages, then `_END`, go to the queue."""
        bodies = [request.body]

        async def receive() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        try:
            await self._app(_scope(request), receive, messages.put)
        finally:
            if not gone.is_set():
                await messages.put(_END)


def _scope(request: HttpRequest) -> Scope:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": request.method,
        "path": unquote(request.path), "raw_path": request.path.encode("latin-1"), "root_path": "",
        "query_string": request.query.encode("latin-1"), "client": None, "server": None,
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in request.headers],
    }  # fmt: skip


async def _next(messages: asyncio.Queue[Message | object], call: asyncio.Task[None]) -> Any:
    message = await messages.get()
    if message is _END:
        await call  # raises what the app raised
        raise AssertionError("the app ended without an answer")
    return message


async def _parts(messages: asyncio.Queue[Message | object], call: asyncio.Task[None]) -> AsyncIterator[bytes]:
    while (message := await messages.get()) is not _END:
        assert isinstance(message, dict)
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body", False):
            return
    await call
