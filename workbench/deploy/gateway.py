"""Gateway: takes HTTP requests in front of the engine's replicas, and answers for a replica that is lost.

Until the first byte of an answer is sent, a request whose replica died is given to another one: computing it twice changes
nothing. After that the stream ends with an error event that says so. Without any replica the answer is 503 with Retry-After.

Boundary: HTTP in, calls out. Who may ask is the replicas' to say (they see the same headers).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from workbench.api.errors import json_response
from workbench.deploy.prefix import prefix_chain
from workbench.deploy.wire import REPEATABLE, AnswerStart, HttpRequest

log = logging.getLogger(__name__)
_MAX_TRIES = 3
_FIRST_BYTE_S = 600.0  # waiting for a replica, for its queue, and for a whole answer that is not streamed
_OWN_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "upgrade", "te", "trailer"}
_LOST = (RayActorError, RayServeException, RayError)


class Gateway:
    """The ingress of the application. `engines` is the handle of the replicas."""

    def __init__(self, engines: Any, max_body_bytes: int) -> None:
        self._engines = engines.options(stream=True)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        path = request.url.path
        if path == "/healthz":
            return json_response({"status": "alive"})
        if path not in REPEATABLE and path != "/readyz":
            return _error(404, f"{path} is not served by a Ray deployment", "not_found")
        try:
            body = await self._read(request)
        except ClientDisconnect:
            return Response(status_code=499)
        if body is None:
            limit = self._max_body_bytes
            return _error(413, f"the body is over the limit of {limit} bytes", "body_too_large")
        return await self._ask(
            HttpRequest(
                request.method, path, request.url.query,
                tuple((name, value) for name, value in request.headers.items() if name not in _OWN_HEADERS),
                body, prefix_chain(body),
            )
        )  # fmt: skip

    async def _read(self, request: Request) -> bytes | None:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._max_body_bytes:
                return None
            parts.append(part)
        return b"".join(parts)

    async def _ask(self, wanted: HttpRequest) -> Response:
        for number in range(_MAX_TRIES):
            answer = self._engines.forward.remote(wanted)
            try:
                start: AnswerStart = await asyncio.wait_for(anext(answer), _FIRST_BYTE_S)
            except BackPressureError:
                return _error(
                    429, "as many requests wait as may wait; try again", "queue_full", retry_after=2
                )
            except TimeoutError:
                answer.cancel()
                break
            except _LOST as error:
                log.warning("try %d of %s was lost: %s", number + 1, wanted.path, type(error).__name__)
                continue
            headers = {name: value for name, value in start.headers if name not in _OWN_HEADERS}
            if not start.is_stream:
                return Response(start.body, start.status, headers)
            return StreamingResponse(_rest(answer), start.status, headers)
        return _error(503, "no replica could answer; try again", "replica_lost", retry_after=2)


async def _rest(answer: Any) -> AsyncIterator[bytes]:
    """The rest of an event stream; its last event is an error where the replica is lost."""
    try:
        async for part in answer:
            yield part
    except _LOST as error:
        log.warning("a stream was cut: %s", type(error).__name__)
        yield (
            b"data: "
            + json.dumps(_body(503, "the replica was lost; try again", "replica_lost")).encode()
            + b"\n\n"
        )
    finally:
        answer.cancel()


def _error(status: int, message: str, code: str, retry_after: int | None = None) -> Response:
    headers = None if retry_after is None else {"retry-after": str(retry_after)}
    return json_response(_body(status, message, code), status, headers)


def _body(status: int, message: str, code: str) -> dict[str, Any]:
    kind = (
        "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
