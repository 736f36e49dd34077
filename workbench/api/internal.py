"""/quire/*: what this machine's own programs ask of the running app: load, unload, sleep, complete, score, read records.

Notebooks, jobs and the CLI come here through ``workbench.backends.app.AppBackend``. Everyone must bring the token of
``HOME_DIR/run/app.json``, or an API key with the right ADMIN. Shapes are ``workbench.backends.codec``'s; errors are as under /v1, with value, limit and remedy.

Boundary: HTTP around EngineHost and EngineWorker. No public surface: it may change with any version.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import EngineError
from engine.sampling_params import SamplingParams
from workbench.api.answer_log import AnswerLog
from workbench.api.auth import may_administer
from workbench.api.disconnect import ClientGone, unless_gone
from workbench.api.errors import UnauthorizedError, error_response, json_response, on_unexpected_error
from workbench.api.intake import read_json
from workbench.api.internal_log import RequestLogRoute
from workbench.api.internal_pooling import InternalPoolingRoutes
from workbench.api.pooling import Pool
from workbench.errors import ApiError, WorkbenchError
from workbench.host import EngineHost, HostPhase, Resident
from workbench.load_options import LoadOptions
from workbench.resident_format import format_of

if TYPE_CHECKING:
    from engine.records import Completion
    from engine.stream import RequestStream
    from engine.tokenizer import TokenizerLike
    from engine.worker import EngineWorker
    from workbench.services import Services

MAX_BODY_BYTES = 64 << 20


def internal_app(host: EngineHost, token: str, services: Services | None = None) -> ASGIApp:
    """The routes behind the token, to be mounted at /quire."""
    routes = InternalRoutes(host, services)
    pooling = InternalPoolingRoutes(Pool(host, services), MAX_BODY_BYTES)
    app = Starlette(
        routes=[
            Route("/load", routes.load, methods=["POST"]),
            Route("/unload", routes.unload, methods=["POST"]),
            Route("/sleep", routes.sleep, methods=["POST"]),
            Route("/wake_up", routes.wake_up, methods=["POST"]),
            Route("/is_sleeping", routes.is_sleeping, methods=["GET"]),
            Route("/residents", routes.residents, methods=["GET"]),
            Route("/stats", routes.stats, methods=["GET"]),
            Route("/records", routes.records, methods=["GET"]),
            Route("/rotate_request_log", RequestLogRoute(services).rotate, methods=["POST"]),
            Route("/score", routes.score, methods=["POST"]),
            Route("/token_kl", routes.token_kl, methods=["POST"]),
            Route("/embed", pooling.embed, methods=["POST"]),
            Route("/rerank", pooling.rerank, methods=["POST"]),
            Route("/generate", routes.generate, methods=["POST"]),
            Route("/chat", routes.chat, methods=["POST"]),
        ],
        exception_handlers={
            EngineError: _on_typed_error,
            WorkbenchError: _on_typed_error,
            ClientGone: _on_client_gone,
            HTTPException: _on_http_exception,
            Exception: on_unexpected_error,
        },
    )
    return RequireToken(app, token)


class RequireToken:
    """ASGI: 401 unless the request brings the token, or an API key with the right to everything (`workbench.api.auth`)."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()
        assert token, "an empty token would let everybody in"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value for name, value in scope.get("headers", ()) if name == b"authorization"), b"")
        if secrets.compare_digest(given, self._expected) or may_administer(scope):
            await self._app(scope, receive, send)
            return
        error = UnauthorizedError(
            "these routes need the app's token", param="authorization", limit="Authorization: Bearer TOKEN",
            remedy="Use workbench.connect(), which reads it from HOME_DIR/run/app.json.",
        )  # fmt: skip
        await error_response(error, details=True)(scope, receive, send)


class InternalRoutes:
    """The handlers, with what they need."""

    def __init__(self, host: EngineHost, services: Services | None) -> None:
        self._host = host
        self._services = services

    async def load(self, request: Request) -> Response:
        """Make a version resident for the caller, who gives it back with `unload`; with `hold` false until anybody does."""
        body = await _body(request, {"ref", "deterministic", "options", "hold"})
        ref, deterministic, hold = _text(body, "ref"), _flag(body, "deterministic"), _flag(body, "hold", True)
        options = _options(body)
        resident = await asyncio.to_thread(
            self._host.load, ref, deterministic=deterministic, options=options, hold=hold
        )
        if hold and await request.is_disconnected():  # nobody is there to give it back
            await asyncio.to_thread(self._host.release, resident.id)
        return json_response({"id": resident.id, "resident": resident_to_json(resident)})

    async def unload(self, request: Request) -> Response:
        """Take the caller's load back; the version goes when nobody else needs it, with `hold` false whoever does."""
        body = await _body(request, {"id", "hold"})
        leave = self._host.release if _flag(body, "hold", True) else self._host.unload
        await asyncio.to_thread(leave, _text(body, "id"))
        return json_response({})

    async def sleep(self, request: Request) -> Response:
        """Have a model give its device memory back; answers when its running requests have ended and it sleeps."""
        body = await _body(request, {"id", "level"})
        level = body.get("level", 1)
        resident = await asyncio.to_thread(self._host.sleep, _text(body, "id"), level)
        return json_response({"resident": resident_to_json(resident)})

    async def wake_up(self, request: Request) -> Response:
        """Have a model take requests again."""
        model = _text(await _body(request, {"id"}), "id")
        resident = await asyncio.to_thread(self._host.wake, model)
        return json_response({"resident": resident_to_json(resident)})

    async def is_sleeping(self, request: Request) -> Response:
        """Whether a model sleeps, or is about to."""
        phase = self._host.find(request.query_params.get("model")).state.phase
        return json_response({"is_sleeping": phase is HostPhase.SLEEPING})

    async def residents(self, request: Request) -> Response:
        everyone = self._host.resident()
        ready = [each for each in everyone if each.state.loaded or each.is_default]
        loading = [each for each in everyone if not (each.state.loaded or each.is_default)]
        return json_response(
            {
                "residents": [resident_to_json(each) for each in ready],
                "loading": [resident_to_json(each) for each in loading],
                "draining": [resident_to_json(each) for each in self._host.draining()],
                "followed": [asdict(each) for each in self._host.followed()],
            }
        )

    async def stats(self, request: Request) -> Response:
        from workbench.backends import codec

        worker = self._host.worker(request.query_params.get("model"))
        return json_response({"stats": codec.stats_to_json(worker.stats())})

    async def records(self, request: Request) -> Response:
        from workbench.backends import codec

        since = request.query_params.get("since_ns")
        if since is not None and not since.lstrip("-").isdigit():
            raise ApiError(f"since_ns={since!r} is no integer", value=since, param="since_ns")
        since_ns = None if since is None else int(since)
        worker = self._host.worker(request.query_params.get("model"))
        log = worker.records

        def write() -> bytes:
            steps = [codec.step_summary(step) for step in log.steps(since_ns)]
            own = [each for each in log.requests(since_ns) if each.lora == worker.lora]
            records = codec.Records(own, steps)
            return json.dumps(codec.records_to_json(records), separators=(",", ":")).encode()

        return _json_bytes(await asyncio.to_thread(write))

    async def score(self, request: Request) -> Response:
        """Log-probabilities of given texts."""
        from engine.llm import LLM
        from workbench.backends import codec

        body = await _body(request, {"model", "texts"})
        texts = _list(body, "texts")
        llm = LLM.from_worker(self._host.worker(_model(body)))
        scores = await asyncio.to_thread(llm.score, texts, use_tqdm=False)
        return json_response({"scores": [codec.score_to_json(score) for score in scores]})

    async def token_kl(self, request: Request) -> Response:
        """Exact KL divergence of two resident models along given texts."""
        from engine.llm import LLM
        from workbench.backends import codec

        body = await _body(request, {"model", "other", "texts"})
        texts = _list(body, "texts")
        llm = LLM.from_worker(self._host.worker(_model(body)))
        other = LLM.from_worker(self._host.worker(_text(body, "other")))
        found = await asyncio.to_thread(llm.token_kl, other, texts)
        return json_response({"divergences": [codec.token_kl_to_json(each) for each in found]})

    async def generate(self, request: Request) -> Response:
        """Complete prompts, given as text or token ids."""
        body = await _body(request, {"model", "prompts", "params"})
        prompts = _list(body, "prompts")
        worker = self._host.worker(_model(body))
        text = "\n".join(prompt for prompt in prompts if isinstance(prompt, str))
        completions = await self._complete(
            request, worker, prompts, _params(body, len(prompts)), self._answer_log(text)
        )
        return await _completions(completions)

    async def chat(self, request: Request) -> Response:
        """Answer conversations."""
        body = await _body(request, {"model", "messages", "params", "tools"})
        conversations = _list(body, "messages")
        worker = self._host.worker(_model(body))
        tokenizer = _tokenizer(worker)
        tools: Sequence[Mapping[str, Any]] | None = body.get("tools") or None
        params = _params(body, len(conversations))
        prompts = await asyncio.to_thread(
            lambda: [tokenizer.apply_chat_template(each, tools=tools) for each in conversations]
        )
        answer_log = self._answer_log(json.dumps(conversations, ensure_ascii=False))
        return await _completions(await self._complete(request, worker, prompts, params, answer_log))

    def _answer_log(self, prompt: str) -> AnswerLog:
        return AnswerLog(self._services.request_log if self._services else None, prompt)

    async def _complete(
        self,
        request: Request,
        worker: EngineWorker,
        prompts: Sequence[str | Sequence[int]],
        params: Sequence[SamplingParams],
        answer_log: AnswerLog,
    ) -> list[Completion]:
        """Run requests to their end; they are aborted when the client leaves."""
        streams = await asyncio.to_thread(_submit, worker, prompts, params, answer_log)

        async def results() -> list[Completion]:
            return list(await asyncio.gather(*(stream.aresult() for stream in streams)))

        completions = await unless_gone(request, results())
        answer_log.ended(completions)
        await answer_log.written()
        return completions


def _submit(
    worker: EngineWorker,
    prompts: Sequence[str | Sequence[int]],
    params: Sequence[SamplingParams],
    answer_log: AnswerLog,
) -> list[RequestStream]:
    """Submit all of them or none."""
    request_ids = [uuid.uuid4().hex for _ in prompts]
    with answer_log.expected(request_ids):
        return worker.submit_all(prompts, params, request_ids=request_ids)


def resident_to_json(resident: Resident) -> dict[str, Any]:
    """A resident's facts, without its card's prompts."""
    card = resident.card
    return {
        "id": resident.id,
        "ref": resident.ref,
        "title": card.title if card else resident.id,
        "path": card.path if card else None,
        "context": card.context if card else None,
        "phase": resident.state.phase.value,
        "message": resident.state.message,
        "fraction": resident.state.fraction,
        "deterministic": resident.deterministic,
        "is_default": resident.is_default,
        "digest": resident.digest,
        "name": resident.name,
        "version": resident.version,
        "aliases": list(resident.aliases),
        "followed": resident.followed,
        "memory_bytes": resident.memory_bytes,
        "parent": resident.parent,
        "merged_because": resident.merged_because,
        "task": resident.task,
        "adapters": list(resident.adapters),
        "options": resident.options.as_dict(),
        **format_of(resident),
    }


async def _completions(completions: Sequence[Completion]) -> Response:
    from workbench.backends import codec

    def write() -> bytes:  # token ids and log-probabilities of many requests: beside the event loop
        body = {"completions": [codec.completion_to_json(each) for each in completions]}
        return json.dumps(body, separators=(",", ":")).encode()

    return _json_bytes(await asyncio.to_thread(write))


def _json_bytes(body: bytes) -> Response:
    return Response(body, media_type="application/json")


async def _body(request: Request, known: set[str]) -> dict[str, Any]:
    body = await read_json(request, MAX_BODY_BYTES)
    if not isinstance(body, dict):
        raise ApiError(f"the body must be a JSON object, got {type(body).__name__}", limit="object")
    for name in body:
        if name not in known:
            raise ApiError(f"unknown field {name!r}", value=name, limit=sorted(known), param=name)
    return body


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise ApiError(f"{name} must be a text, got {value!r}", value=value, param=name)
    return value


def _model(body: Mapping[str, Any]) -> str | None:
    return None if body.get("model") is None else _text(body, "model")


def _flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise ApiError(f"{name} must be true or false, got {value!r}", value=value, param=name)
    return value


def _options(body: Mapping[str, Any]) -> LoadOptions:
    given = body.get("options") or {}
    if not isinstance(given, dict):
        raise ApiError(f"options must be an object, got {given!r}", value=given, param="options")
    return LoadOptions.from_dict(given)


def _list(body: Mapping[str, Any], name: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list) or not value:
        raise ApiError(f"{name} must be a list that is not empty, got {type(value).__name__}", param=name)
    return value


def _params(body: Mapping[str, Any], count: int) -> list[SamplingParams]:
    """One a prompt; a single object counts for all. Raises InvalidParamsError."""
    from workbench.backends import codec

    given = body.get("params")
    if given is None or isinstance(given, dict):
        return [codec.params_from_json(given or {})] * count
    if not isinstance(given, list) or len(given) != count or not all(isinstance(p, dict) for p in given):
        raise ApiError(
            f"params must be one object or {count} of them",
            value=len(given) if isinstance(given, list) else given,
            limit=count,
            param="params",
        )
    return [codec.params_from_json(each) for each in given]


def _tokenizer(worker: EngineWorker) -> TokenizerLike:
    if worker.tokenizer is None:
        raise ApiError(
            "this model has no tokenizer", param="model", remedy="Use token ids with /quire/generate."
        )
    return worker.tokenizer


async def _on_typed_error(request: Request, error: Exception) -> Response:
    return error_response(error, details=True)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = ApiError(f"{request.method} {request.url.path} does not exist", value=request.url.path)
    response = error_response(problem)
    response.status_code = error.status_code
    return response
