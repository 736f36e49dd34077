"""/openapi.json: the API's document, made of the types that parse bodies (`schema`) and of those of answers (`answers`).

`OPERATIONS` names every public route with what it takes, answers and refuses; tests hold it against the app's routes, and every
answer that they get against the document. /quire is for this machine's own programs, behind their token, and /mlflow is MLflow's
server: both are left out.

Boundary: the document. Nothing here parses or answers a request. Source: OpenAPI 3.1.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from workbench.access.principal import Right
from workbench.api import answers, load, responses_schema, schema
from workbench.api.auth import rights_for
from workbench.api.timeout import HEADER, MAX_TIMEOUT_MS

_STATUSES = {
    400: "The request cannot be answered as it is: `param` names what is meant, the message the limit and the remedy.",
    401: "No API key, or one that opens nothing, on a server that asks for keys.",
    403: "An API key without the right to it, another site's page, a foreign Host header, or something that is not allowed here.",
    404: "There is no such model, adapter or request here.",
    408: "The body came too slowly, or there was no output when the time that `x-request-timeout-ms` gives was over.",
    409: "It is in use.",
    413: "The body is over the limit.",
    415: "The body is not declared as application/json.",
    422: "The files cannot be served.",
    431: "The request's headers are over the limit.",
    429: "As much waits as may wait, or the API key has used up a limit; `retry-after` says when there may be room.",
    500: "A step failed; send it again.",
    503: "No model can answer now, the API keys cannot be read, the request waited too long, or the server stops; `retry-after` says when to try again.",
}
_TEXT, _EVENTS, _JSON = "text/plain", "text/event-stream", "application/json"


@dataclass(frozen=True, slots=True)
class Operation:
    """One route: what it takes and answers, and which refusals it has beside the ones that all have (403 and 500)."""

    method: str
    path: str
    summary: str
    answer: type[BaseModel] | None = None  # None: plain text
    body: type[BaseModel] | None = None
    refusals: tuple[int, ...] = ()
    events: str = ""  # what is streamed where the body says `stream`
    other: tuple[int, ...] = ()  # statuses with the answer of 200

    @property
    def statuses(self) -> tuple[int, ...]:
        """Of its refusals."""
        of_bodies = (400, 408, 413, 415) if self.body is not None else ()
        of_keys = (401, 503) if self.rights else ()
        of_limits = (429,) if self.rights == (Right.INFER,) else ()
        return tuple(sorted({403, 431, 500, *of_bodies, *of_keys, *of_limits, *self.refusals}))

    @property
    def rights(self) -> tuple[Right, ...]:
        """Of which a key needs one; none where no key is asked for."""
        return rights_for(self.path) or ()


_MODEL = (404, 503)
_QUEUE = (404, 429, 503)
_CHUNKS = '`data: {…}` for each chunk, then `data: [DONE]`; an error in between is `data: {"error": …}`.'
_TIMEOUT = {
    "name": HEADER, "in": "header", "required": False,
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS},
    "description": "Milliseconds from its arrival after which the request ends: with 408 while it has no output, else with what it has,"
    " `finish_reason` \"length\" and `stop_reason` \"timeout\".",
}  # fmt: skip
_RERANK = "Documents by relevance to a query, the best first"
OPERATIONS = (
    Operation("post", "/v1/chat/completions", "An answer to a conversation", answers.ChatCompletion,
              schema.ChatRequest, _QUEUE, _CHUNKS),
    Operation("post", "/v1/completions", "How a text goes on", answers.Completion, schema.CompletionRequest, _QUEUE, _CHUNKS),
    Operation("post", "/v1/responses", "An answer to a conversation, as items", answers.ResponseAnswer,
              responses_schema.ResponsesRequest, _QUEUE,
              "OpenAI's events, numbered, from `response.created` to `response.completed`, `.incomplete` or `.failed`."),
    Operation("post", "/v1/embeddings", "Texts as vectors", answers.EmbeddingList, schema.EmbeddingRequest, _QUEUE),
    *(Operation("post", path, _RERANK, answers.RerankAnswer, schema.RerankRequest, _QUEUE)
      for path in ("/v1/rerank", "/rerank", "/v2/rerank")),
    Operation("post", "/v1/score", "How well the texts of each pair fit", answers.ScoreAnswer, schema.ScoreRequest, _QUEUE),
    Operation("post", "/tokenize", "A prompt's or conversation's tokens", answers.TokenizeAnswer, schema.TokenizeRequest, _MODEL),
    Operation("post", "/detokenize", "The text of tokens", answers.DetokenizeAnswer, schema.DetokenizeRequest, _MODEL),
    Operation("get", "/v1/models", "The models that answer here", answers.ModelList),
    Operation("get", "/v1/models/{model_id}", "One of them, also by alias", answers.ModelEntry, None, _MODEL),
    Operation("post", "/v1/feedback", "What a person thinks of an answer", answers.FeedbackAnswer, schema.FeedbackRequest,
              (404, 503)),
    Operation("post", "/v1/load_lora_adapter", "Serve an adapter", None, schema.LoadLoraRequest, (404, 409, 422, 503)),
    Operation("post", "/v1/unload_lora_adapter", "Serve it no longer", None, schema.UnloadLoraRequest, (404, 409, 503)),
    Operation("get", "/healthz", "Whether the process is alive: restarting it would not help", answers.ProbeAnswer, other=(503,)),
    Operation("get", "/health", "The same by vLLM's name, which its clients ask first", answers.ProbeAnswer, other=(503,)),
    Operation("get", "/readyz", "Whether a request would be answered now", answers.ProbeAnswer, other=(503,)),
    Operation("get", "/metrics", "Prometheus metrics"),
    Operation("get", "/load", "How much room there is: slots, tokens, blocks", load.LoadAnswer),
    Operation("post", "/drain", "Take no more requests; those that run go on", load.DrainAnswer),
    Operation("post", "/resume", "Take requests again", load.DrainAnswer),
    Operation("get", "/openapi.json", "This document", answers.DocumentAnswer),
)  # fmt: skip


class OpenApiRoute:
    """The handler; the document is made when it is first asked for."""

    async def get(self, request: Request) -> Response:
        """GET /openapi.json."""
        return Response(self._content, media_type=_JSON)

    @cached_property
    def _content(self) -> bytes:
        return json.dumps(document()).encode()


def document() -> dict[str, Any]:
    """The whole document."""
    models: set[type[BaseModel]] = {answers.ErrorAnswer}
    for each in OPERATIONS:
        models.update(kind for kind in (each.answer, each.body) if kind is not None)
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (kind, "validation") for kind in sorted(models, key=lambda kind: kind.__name__)
    ]
    _, found = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {})[each.method] = _operation(each)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Quire",
            "version": importlib.metadata.version("quire"),
            "description": "OpenAI's API with vLLM's extras over the engine of this process. A field that is not here is refused by"
            " name; a null means the default.",
        },
        "paths": paths,
        "components": {
            "schemas": found["$defs"],
            "securitySchemes": {"api_key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(each: Operation) -> dict[str, Any]:
    content = {_TEXT: {"schema": {"type": "string"}}} if each.answer is None else {_JSON: _ref(each.answer)}
    good: dict[str, Any] = {"description": f"{each.summary}.", "content": content}
    if each.events:  # 3.1 has no schema for events one by one
        good = {
            "description": f"{each.summary}. Streamed: {each.events}",
            "content": {**content, _EVENTS: {}},
        }
    refused = {
        str(status): {"description": _STATUSES[status], "content": {_JSON: _ref(answers.ErrorAnswer)}}
        for status in each.statuses
    }
    others = {str(status): {"description": "It does not hold.", "content": content} for status in each.other}
    made: dict[str, Any] = {
        "operationId": each.method + each.path.translate(str.maketrans("/.{", "___", "}")),
        "summary": each.summary,
        "responses": {"200": good, **refused, **others},
    }
    if each.rights:
        needed = " or ".join(right.value for right in each.rights)
        made["description"] = f"Where keys are asked for: one with the right {needed}, or admin."
        made["security"] = [{"api_key": []}, {}]
    if each.body is not None:
        made["requestBody"] = {"required": True, "content": {_JSON: _ref(each.body)}}
    if each.refusals == _QUEUE:
        made["parameters"] = [_TIMEOUT]
    if "{" in each.path:
        made["parameters"] = [
            {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return made


def _ref(kind: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
