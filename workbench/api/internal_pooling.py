"""/quire/embed and /quire/rerank: embeddings and relevances for this machine's own programs, in float64.

Boundary: HTTP around `workbench.api.pooling.Pool`; the token is checked by ``workbench.api.internal``.
"""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from engine.embedding import ranked
from workbench.api.errors import json_response
from workbench.api.intake import read_json, take_request_id
from workbench.api.pooling import Call, Pool
from workbench.api.schema import InternalEmbedRequest, InternalRerankRequest, parse
from workbench.backends import codec


class InternalPoolingRoutes:
    """The handlers; `max_body_bytes` bounds a body."""

    def __init__(self, pool: Pool, max_body_bytes: int) -> None:
        self._pool = pool
        self._max_body_bytes = max_body_bytes

    async def embed(self, request: Request) -> Response:
        body = parse(InternalEmbedRequest, await read_json(request, self._max_body_bytes))
        params = codec.pooling_from_json(body.params)
        found = await self._pool.embed(_call(request), body.model, body.texts, params)
        return json_response({"embeddings": [codec.embedding_to_json(each) for each in found]})

    async def rerank(self, request: Request) -> Response:
        body = parse(InternalRerankRequest, await read_json(request, self._max_body_bytes))
        params = codec.pooling_from_json(body.params)
        found = await self._pool.rerank(_call(request), body.model, body.query, body.documents, params)
        return json_response({"relevances": [codec.relevance_to_json(each) for each in ranked(found)]})


def _call(request: Request) -> Call:
    return Call(request, take_request_id(request), time.monotonic_ns())
