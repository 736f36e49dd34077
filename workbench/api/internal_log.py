"""/quire/rotate_request_log: what the command line asks of the process that writes the request log before it erases."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from starlette.requests import Request
from starlette.responses import Response

from workbench.api.errors import json_response
from workbench.api.intake import read_json
from workbench.errors import ApiError
from workbench.observe.erase import Kind, Subject

if TYPE_CHECKING:
    from workbench.services import Services

_MAX_BODY_BYTES = 64 * 1024


class RequestLogRoute:
    """The handler, with whose log it is."""

    def __init__(self, services: Services | None) -> None:
        self._services = services

    async def rotate(self, request: Request) -> Response:
        """Put every logged request onto closed files, and add no more texts to those of a user, session or request."""
        body: Any = await read_json(request, _MAX_BODY_BYTES)
        kind, name = (body.get("kind"), body.get("id")) if isinstance(body, dict) else (None, None)
        if kind not in ("user", "session", "request") or not isinstance(name, str):
            raise ApiError(
                "kind and id say whose", value=kind, limit="user, session or request", param="kind"
            )
        subject = Subject(cast(Kind, kind), name)
        request_log = self._services.request_log if self._services is not None else None
        done = request_log is not None and await asyncio.to_thread(request_log.rotate, subject.owns)
        return json_response({"done": done})
