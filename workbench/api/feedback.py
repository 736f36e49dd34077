"""POST /v1/feedback: what people think of an answer, acknowledged when it is on the disk."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from workbench.api.errors import json_response
from workbench.api.intake import read_json, take_request_id
from workbench.api.schema import FeedbackRequest, parse
from workbench.errors import NotReadyError

if TYPE_CHECKING:
    from workbench.services import Services

MAX_BODY_BYTES = 1 << 20
_ID_PREFIXES = ("chatcmpl-", "cmpl-", "resp_")  # of an answer's `id`; the rest is the request's


class StoreNotReadyError(NotReadyError):
    """The server has no store to write to."""

    code = "store_not_ready"


class FeedbackRoute:
    """The handler, with where it writes."""

    def __init__(self, services: Services | None) -> None:
        self._services = services

    async def post(self, request: Request) -> Response:
        """POST /v1/feedback. Raises FeedbackError, StoreError."""
        request_id = take_request_id(request)
        body = parse(FeedbackRequest, await read_json(request, MAX_BODY_BYTES))
        store = self._services.store if self._services is not None else None
        if store is None:
            raise StoreNotReadyError("this server keeps no records yet", remedy="Try again in some seconds.")
        from workbench.observe import feedback

        kept = await asyncio.to_thread(
            feedback.record, store, _plain_id(body.request_id), body.kind, body.value, body.comment,
            correction=body.correction, user=body.user,
        )  # fmt: skip
        return json_response(kept.as_dict(), headers={"x-request-id": request_id})


def _plain_id(answer_id: str) -> str:
    for prefix in _ID_PREFIXES:
        answer_id = answer_id.removeprefix(prefix)
    return answer_id
