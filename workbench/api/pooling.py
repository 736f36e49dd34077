"""/v1/embeddings, /v1/rerank and /v1/score: texts as vectors, documents by relevance, pairs rated.

Embeddings are OpenAI's, rerank is Jina's and Cohere's as vLLM has it, score is vLLM's. The engine batches texts of all clients.

Boundary: HTTP. Which requests a text takes, and what a model cannot do, is ``engine.embedding``'s.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from engine.embedding import (
    Embedding,
    PooledRequests,
    Relevance,
    embedding_requests,
    embeddings_of,
    pair_requests,
    ranked,
    relevances_of,
    search_pairs,
)
from engine.pooling import PoolingParams, Vector
from engine.request import FinishReason
from workbench.access.limits import Cost, client_in_use, reserved
from workbench.api.answer_log import AnswerLog
from workbench.api.disconnect import unless_gone
from workbench.api.endpoints import on_current_worker
from workbench.api.errors import json_response
from workbench.api.generation import raise_if_failed
from workbench.api.intake import read_json, take_request_id
from workbench.api.schema import Body, EmbeddingRequest, RerankRequest, ScoreRequest, parse
from workbench.api.timeout import take_timeout
from workbench.errors import ApiError
from workbench.host import EngineHost
from workbench.settings import Settings

if TYPE_CHECKING:
    from engine.records import Completion
    from engine.worker import EngineWorker
    from workbench.services import Services

MAX_TEXTS = 2048  # of one request; OpenAI's limit for inputs
T = TypeVar("T")
Asked = Callable[["EngineWorker"], PooledRequests]
Found = Callable[["EngineWorker", "list[Completion]"], T]


class PoolingRoutes:
    """The handlers, with what they need."""

    def __init__(self, host: EngineHost, settings: Settings, services: Services | None) -> None:
        self._host = host
        self._max_body_bytes = settings.max_body_bytes
        self._pool = Pool(host, services)

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        body, call = await self._read(request, EmbeddingRequest)
        texts = _inputs(body.input)
        params = PoolingParams(
            normalize=body.normalize, dimensions=body.dimensions, truncate_prompt_tokens=body.truncate_prompt_tokens,
            prompt_name=body.prompt_name,
        )  # fmt: skip
        found = await self._pool.embed(call, body.model, texts, params)
        write = _as_base64 if body.encoding_format == "base64" else _as_floats
        data = [
            {"object": "embedding", "index": i, "embedding": write(each.vector)}
            for i, each in enumerate(found)
        ]
        return self._answer(
            call, body.model, {"object": "list", "data": data}, sum(each.num_prompt_tokens for each in found)
        )

    async def rerank(self, request: Request) -> Response:
        """POST /v1/rerank: the documents by relevance, the best first."""
        body, call = await self._read(request, RerankRequest)
        documents = [each if isinstance(each, str) else each.text for each in body.documents]
        _check_count("documents", documents)
        if body.top_n is not None and body.top_n < 0:
            raise ApiError(f"top_n={body.top_n} is below 0", value=body.top_n, limit=0, param="top_n")
        params = PoolingParams(truncate_prompt_tokens=body.truncate_prompt_tokens)
        found = await self._pool.rerank(call, body.model, body.query, documents, params)
        kept = ranked(found)[: body.top_n or None]
        results: list[dict[str, Any]] = [
            {"index": each.index, "relevance_score": each.score} for each in kept
        ]
        if body.return_documents is not False:
            for result in results:
                result["document"] = {"text": documents[result["index"]]}
        return self._answer(
            call, body.model, {"results": results}, sum(each.num_prompt_tokens for each in found)
        )

    async def score(self, request: Request) -> Response:
        """POST /v1/score: each text of one side with its partner of the other; one text stands against all."""
        body, call = await self._read(request, ScoreRequest)
        pairs = _pairs(body)
        params = PoolingParams(truncate_prompt_tokens=body.truncate_prompt_tokens)
        found = await self._pool.score(call, body.model, pairs, params)
        data = [{"object": "score", "index": each.index, "score": each.score} for each in found]
        return self._answer(
            call, body.model, {"object": "list", "data": data}, sum(each.num_prompt_tokens for each in found)
        )

    async def _read(self, request: Request, kind: type[Body]) -> tuple[Body, Call]:
        arrival_ns, request_id = time.monotonic_ns(), take_request_id(request)
        timeout_s = take_timeout(request)
        body = parse(kind, await read_json(request, self._max_body_bytes))
        return body, Call(request, request_id, arrival_ns, getattr(body, "user", None), timeout_s)

    def _answer(self, call: Call, model: str | None, content: dict[str, Any], num_tokens: int) -> Response:
        body = {
            "id": call.request_id,
            "created": int(time.time()),
            "model": model or self._host.models()[0].id,
            **content,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return json_response(body, headers={"x-request-id": call.request_id})


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request that asks for pooled texts."""

    request: Request
    request_id: str
    arrival_ns: int
    user: str | None = None  # whose it is, as the caller says
    timeout_s: float | None = None  # that it may take from its arrival on


class Pool:
    """Runs the engine requests of a call; they are aborted when the client leaves."""

    def __init__(self, host: EngineHost, services: Services | None) -> None:
        self._host = host
        self._log = services.request_log if services is not None else None

    async def embed(
        self, call: Call, model: str | None, texts: Sequence[str | Sequence[int]], params: PoolingParams
    ) -> list[Embedding]:
        """One embedding for each text."""
        return await self._run(
            call, model, texts, lambda worker: embedding_requests(worker, texts, params),
            lambda worker, completions: embeddings_of(worker, completions, params),
        )  # fmt: skip

    async def rerank(
        self, call: Call, model: str | None, query: str, documents: Sequence[str], params: PoolingParams
    ) -> list[Relevance]:
        """How well each document fits the query, in the documents' order."""
        return await self._rate(
            call, model, [query, *documents], lambda worker: search_pairs(worker, query, documents), params
        )

    async def score(
        self, call: Call, model: str | None, pairs: list[tuple[str, str]], params: PoolingParams
    ) -> list[Relevance]:
        """How well the texts of each pair fit."""
        return await self._rate(
            call, model, [text for pair in pairs for text in pair], lambda worker: pairs, params
        )

    async def _rate(
        self,
        call: Call,
        model: str | None,
        texts: Sequence[str],
        pairs: Callable[[EngineWorker], list[tuple[str, str]]],
        params: PoolingParams,
    ) -> list[Relevance]:
        return await self._run(
            call, model, texts, lambda worker: pair_requests(worker, pairs(worker), params),
            lambda worker, completions: relevances_of(worker, pairs(worker), completions, params),
        )  # fmt: skip

    async def _run(
        self,
        call: Call,
        model: str | None,
        texts: Sequence[str | Sequence[int]],
        asked: Asked,
        found: Found[T],
    ) -> T:
        async def start(worker: EngineWorker) -> T:
            answer_log = AnswerLog(self._log, "\n".join(text for text in texts if isinstance(text, str)))
            streams = await asyncio.to_thread(_submit, worker, asked, call, answer_log)

            async def results() -> list[Completion]:
                return list(await asyncio.gather(*(stream.aresult() for stream in streams)))

            completions = await unless_gone(call.request, results())
            answer_log.ended(completions)
            await answer_log.written()
            for completion in completions:
                if completion.finish_reason is FinishReason.TIMEOUT:
                    raise_if_failed(completion.finish_reason, completion.error)
            return await asyncio.to_thread(found, worker, completions)

        return await on_current_worker(self._host, model, start, user=call.user)


def _submit(worker: EngineWorker, asked: Asked, call: Call, answer_log: AnswerLog) -> list[Any]:
    """Tokenize and submit all texts, or none."""
    requests = asked(worker)
    engine_ids = [call.request_id, *(f"{call.request_id}-{i}" for i in range(1, len(requests.prompts)))]
    costs = reserved(lambda: [Cost(*pair, 0) for pair in zip(engine_ids, map(len, requests.prompts))])
    with answer_log.expected(engine_ids), costs:
        return worker.submit_all(
            requests.prompts, requests.params, request_ids=engine_ids, arrival_ns=call.arrival_ns, client=client_in_use(),
            timeout_s=call.timeout_s,
        )  # fmt: skip


def _inputs(given: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | Sequence[int]]:
    """One text or many, as text or token ids."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [given]
    many = cast("list[str | Sequence[int]]", given)
    _check_count("input", many)
    return many


def _pairs(body: ScoreRequest) -> list[tuple[str, str]]:
    first = body.queries if body.text_1 is None else body.text_1
    second = body.documents if body.text_2 is None else body.text_2
    if first is None or second is None:
        raise ApiError(
            "a score needs two sides", param="text_1", limit="text_1 and text_2, or queries and documents",
            remedy="Send both.",
        )  # fmt: skip
    left, right = ([side] if isinstance(side, str) else side for side in (first, second))
    _check_count("text_1", left)
    _check_count("text_2", right)
    if len(left) == 1:
        left = left * len(right)
    if len(left) != len(right):
        raise ApiError(
            f"{len(left)} texts cannot be paired with {len(right)}", value=len(left), limit=f"1 or {len(right)}",
            param="text_1", remedy="Send one text, or as many as on the other side.",
        )  # fmt: skip
    return list(zip(left, right, strict=True))


def _check_count(param: str, texts: Sequence[Any]) -> None:
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise ApiError(
            f"{param} holds {len(texts)} texts", value=len(texts), limit=f"1 to {MAX_TEXTS}", param=param,
            remedy="Send several requests." if texts else "Send at least one.",
        )  # fmt: skip


def _as_floats(vector: Vector) -> list[float]:
    values: list[float] = vector.astype(np.float32).tolist()  # those that base64 has
    return values


def _as_base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
