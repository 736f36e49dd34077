"""/v1/chat/completions, /v1/completions and /v1/models: from a checked body to a running response.

Boundary: what a request means in engine terms. Formats are in `wire`, running requests in `generation`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from engine.errors import EngineDeadError
from engine.sampling_params import MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams
from workbench.api.answer_log import AnswerLog
from workbench.api.constraints import constrained, constraint_of
from workbench.api.errors import json_response
from workbench.api.generation import GenerationResponse, submit_choices
from workbench.api.intake import read_json, take_request_id
from workbench.api.schema import ChatRequest, CompletionRequest, Message, parse
from workbench.api.split_entry import route_entry, split_entry
from workbench.api.timeout import take_timeout
from workbench.api.tools import offered_tools
from workbench.api.wire import ChatWire, CompletionWire, Head, Wire
from workbench.chat_output.syntax import find_calls
from workbench.chat_request import settle_output
from workbench.errors import ApiError, UnknownModelError
from workbench.host import EngineHost, Resident
from workbench.observe import request_context
from workbench.settings import Settings

if TYPE_CHECKING:
    from engine.tokenizer import TokenizerLike
    from engine.worker import EngineWorker
    from workbench.services import Services

MAX_PROMPTS = 256  # of one /v1/completions request
_INLINE_CHARS = 20_000  # longer prompts are tokenized in a thread, beside the event loop
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
T = TypeVar("T")


class Endpoints:
    """The handlers, with what they need."""

    def __init__(self, host: EngineHost, settings: Settings, services: Services | None = None) -> None:
        self._host = host
        self._max_body_bytes = settings.max_body_bytes
        self._stalled_after_s = settings.stalled_client_seconds
        self._services = services
        self._routes = {route.name: route for route in settings.route_table}
        self._started = int(time.time())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        arrival_ns = time.monotonic_ns()
        request_id, timeout_s = take_request_id(request), take_timeout(request)
        body = parse(ChatRequest, await read_json(request, self._max_body_bytes))
        return await on_current_worker(
            self._host,
            body.model,
            lambda worker: self.start_chat(worker, body, request_id, arrival_ns, timeout_s),
            user=body.user or body.safety_identifier,
            metadata=body.metadata,
        )

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        arrival_ns = time.monotonic_ns()
        request_id, timeout_s = take_request_id(request), take_timeout(request)
        body = parse(CompletionRequest, await read_json(request, self._max_body_bytes))
        return await on_current_worker(
            self._host,
            body.model,
            lambda worker: self._start_completion(worker, body, request_id, arrival_ns, timeout_s),
            user=body.user or body.safety_identifier,
            metadata=body.metadata,
        )

    async def start_chat(
        self,
        worker: EngineWorker,
        body: ChatRequest,
        request_id: str,
        arrival_ns: int,
        timeout_s: float | None,
        wire_for: Callable[[TokenizerLike], Wire] | None = None,
    ) -> Response:
        """A conversation's answer, running. `wire_for`: another format than that of chat completions, which tells the usage."""
        worker.pooling.require_generation()
        tokenizer = tokenizer_of(worker)
        params, include_usage = _chat_params(body), _include_usage(body)
        messages = [template_message(message) for message in body.messages]
        config = worker.config
        offered = offered_tools(body, lambda: find_calls(tokenizer, config.tool_call_parser))
        asked = constraint_of(body)
        size = sum(len(message["content"]) for message in messages)
        prompt = await maybe_off_loop(
            size,
            lambda: tokenizer.apply_chat_template(
                messages, tools=offered.tools or None, chat_template_kwargs=body.chat_template_kwargs
            ),
        )
        settled = settle_output(tokenizer, config, prompt, offered, asked)
        prompt, syntax = settled.prompt_ids, settled.syntax
        if syntax.shows_special_tokens:
            params = params.with_(skip_special_tokens=False)
        if syntax.stop_after_call is not None and len(params.stop) < MAX_STOP_STRINGS:
            params = params.with_(stop=(*params.stop, syntax.stop_after_call))
        params = await constrained(params, settled.constraint, worker)
        wire: Wire = wire_for(tokenizer) if wire_for is not None else ChatWire(
            self.head("chatcmpl-", request_id, body.model), tokenizer.token_text,
            wants_logprobs=bool(body.logprobs), include_usage=include_usage, num_prompt_logprobs=body.prompt_logprobs,
        )  # fmt: skip
        answer_log = self._answer_log(lambda: json.dumps(messages, ensure_ascii=False))
        choices = submit_choices(  # the last thing that can refuse: nothing runs that is not answered
            worker, [prompt], params, request_id=request_id,
            cache_salt=body.cache_salt or "", priority=body.priority or 0, client=client_of(body), arrival_ns=arrival_ns,
            timeout_s=timeout_s, answer_log=answer_log,
            syntax=syntax, include_reasoning=body.include_reasoning is not False,
        )  # fmt: skip
        return GenerationResponse(
            choices, wire, request_id=request_id, stream=bool(body.stream),
            include_usage=include_usage or wire_for is not None, answer_log=answer_log,
            continuous_usage=include_usage and _continuous_usage(body),
            stalled_after_s=self._stalled_after_s,
        )  # fmt: skip

    async def _start_completion(
        self,
        worker: EngineWorker,
        body: CompletionRequest,
        request_id: str,
        arrival_ns: int,
        timeout_s: float | None,
    ) -> Response:
        worker.pooling.require_generation()
        tokenizer = tokenizer_of(worker)
        params = _completion_params(body)
        include_usage, constraint = _include_usage(body), constraint_of(body)
        given = _prompt_list(body.prompt)
        size = sum(len(p) for p in given if isinstance(p, str))
        prompts = await maybe_off_loop(
            size, lambda: [tokenizer.encode(p) if isinstance(p, str) else p for p in given]
        )
        echoes = None
        if body.echo:
            echoes = [
                p if isinstance(p, str) else tokenizer.decode(p, params.skip_special_tokens) for p in given
            ]
        params = await constrained(params, constraint, worker)
        wire = CompletionWire(
            self.head("cmpl-", request_id, body.model), tokenizer.token_text, num_logprobs=body.logprobs,
            include_usage=include_usage, num_prompt_logprobs=body.prompt_logprobs,
        )  # fmt: skip
        answer_log = self._answer_log(lambda: "\n".join(p for p in given if isinstance(p, str)))
        choices = submit_choices(
            worker, prompts, params, request_id=request_id,
            cache_salt=body.cache_salt or "", priority=body.priority or 0, client=client_of(body), arrival_ns=arrival_ns,
            timeout_s=timeout_s, answer_log=answer_log, echoes=echoes,
        )  # fmt: skip
        return GenerationResponse(
            choices, wire, request_id=request_id, stream=bool(body.stream), include_usage=include_usage,
            continuous_usage=include_usage and _continuous_usage(body),
            answer_log=answer_log, best_of=params, stalled_after_s=self._stalled_after_s,
        )  # fmt: skip

    def _answer_log(self, prompt: Callable[[], str]) -> AnswerLog:
        request_log = self._services.request_log if self._services is not None else None
        keeps_text = request_log is not None and request_log.text != "off"
        return AnswerLog(request_log, prompt() if keeps_text else "")

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        request_id = take_request_id(request)
        data = [self._model(each) for each in self._host.resident() if _is_listed(each)]
        data += [split_entry(self._host, split, self._started) for split in self._host.splits.values()]
        data += [route_entry(route, self._started) for route in self._routes.values()]
        return json_response({"object": "list", "data": data}, headers={"x-request-id": request_id})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}: also by alias, NAME/version or ``models:/…``."""
        request_id = take_request_id(request)
        model_id = request.path_params["model_id"]
        if model_id in self._host.splits:
            shown = split_entry(self._host, self._host.splits[model_id], self._started)
            return json_response(shown, headers={"x-request-id": request_id})
        if model_id in self._routes:
            shown = route_entry(self._routes[model_id], self._started)
            return json_response(shown, headers={"x-request-id": request_id})
        found = self._host.find(model_id)
        if not _is_listed(found):
            raise UnknownModelError(
                f"model {model_id!r} is not there yet: {found.state.message}", value=model_id, param="model",
                remedy="Try again in some seconds.",
            )  # fmt: skip
        return json_response(self._model(found), headers={"x-request-id": request_id})

    def head(self, prefix: str, request_id: str, model: str | None) -> Head:
        """The constants of an answer that begins now."""
        return Head(f"{prefix}{request_id}", int(time.time()), model or self._host.models()[0].id)

    def _model(self, resident: Resident) -> dict[str, Any]:
        card = resident.card
        assert card is not None, "only models with a card are listed"
        return {
            "id": resident.id,
            "object": "model",
            "created": self._started,
            "owned_by": "quire",
            "root": card.path or card.id,
            "max_model_len": card.context,
            "digest": resident.digest or None,
            "name": resident.name,
            "version": resident.version,
            "aliases": list(resident.aliases),
            "parent": resident.parent,
            "deterministic": resident.deterministic,
            "task": resident.task,
            "stored_as": card.stored_as or None,
            "quantization": resident.config.quantization if resident.config else None,
        }


async def on_current_worker(
    host: EngineHost,
    model: str | None,
    start: Callable[[EngineWorker], Awaitable[T]],
    *,
    user: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> T:
    """`start` on the model's worker, or the user's; again when that was swapped for another while the prompt was read.

    `user` and the session that `metadata` names are remembered for the request log.
    """
    context = request_context.current()
    context.user = user
    context.session = (metadata or {}).get("session_id") or context.session
    worker = host.worker(model, user)
    try:
        return await start(worker)
    except EngineDeadError:
        successor = host.worker(model, user)
        if successor is worker:
            raise
        return await start(successor)


def _is_listed(resident: Resident) -> bool:
    """Whether clients may see it: it is loaded, asleep or not, or the default, whose state `/readyz` tells."""
    return resident.card is not None and (resident.state.loaded or resident.is_default)


def tokenizer_of(worker: EngineWorker) -> TokenizerLike:
    if worker.tokenizer is None:
        raise ApiError(
            "this model has no tokenizer, so it cannot read or write text", param="model",
            remedy="Add tokenizer.json to the model's folder.",
        )  # fmt: skip
    return worker.tokenizer


def _chat_params(body: ChatRequest) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(
            f"top_logprobs={body.top_logprobs} needs logprobs=true", value=body.top_logprobs, param="top_logprobs",
            remedy="Send logprobs=true, or leave top_logprobs out.",
        )  # fmt: skip
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise ApiError(
            f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {body.top_logprobs}", value=body.top_logprobs,
            limit=MAX_LOGPROBS, param="top_logprobs", remedy="Ask for fewer.",
        )  # fmt: skip
    given = {v for v in (body.max_tokens, body.max_completion_tokens) if v is not None}
    if len(given) > 1:
        raise ApiError(
            f"max_tokens={body.max_tokens} and max_completion_tokens={body.max_completion_tokens} contradict each other",
            value=sorted(given), param="max_completion_tokens", remedy="Send one of them.",
        )  # fmt: skip
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _common_params(body, next(iter(given), None), None, logprobs)


def _completion_params(body: CompletionRequest) -> SamplingParams:
    """As `_common_params`; an echoed prompt has its log-probabilities where the output has them."""
    params = _common_params(body, body.max_tokens, _DEFAULT_COMPLETION_TOKENS, body.logprobs)
    if body.best_of is not None:
        params = params.with_(best_of=body.best_of)
    if params.chooses and body.stream:
        raise ApiError(
            f"best_of={body.best_of} with n={params.n} cannot be streamed: which are best is known at the end",
            value=body.best_of, limit=params.n, param="best_of", remedy="Send stream=false, or best_of equal to n.",
        )  # fmt: skip
    return params


def _scored(body: ChatRequest | CompletionRequest) -> int | None:
    """prompt_logprobs of the engine's requests: what was asked for by name, or by echo."""
    asked = body.prompt_logprobs
    if asked is not None and not 0 <= asked <= MAX_LOGPROBS:
        raise ApiError(
            f"prompt_logprobs must be between 0 and {MAX_LOGPROBS}, got {asked}", value=asked, limit=MAX_LOGPROBS,
            param="prompt_logprobs", remedy="Ask for fewer.",
        )  # fmt: skip
    if asked is not None and body.stream:
        raise ApiError(
            f"prompt_logprobs={asked} cannot be streamed", value=asked, limit="stream=false", param="prompt_logprobs",
            remedy="Send stream=false, or echo=true with logprobs to /v1/completions.",
        )  # fmt: skip
    if (
        isinstance(body, CompletionRequest)
        and body.echo
        and (body.logprobs is not None or body.max_tokens == 0)
    ):
        return max(asked or 0, body.logprobs or 0)
    return asked


def _common_params(
    body: ChatRequest | CompletionRequest,
    max_tokens: int | None,
    default_max: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """Sampling parameters of a body; a null means the default, as OpenAI has it. Raises InvalidParamsError."""
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "typical_p": body.typical_p,
        "prompt_logprobs": _scored(body),
        "n": body.n,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": body.logit_bias,
        "bad_words": body.bad_words,
        "allowed_token_ids": body.allowed_token_ids,
        "seed": body.seed,
        "stop": body.stop,
        "stop_token_ids": body.stop_token_ids,
        "ignore_eos": body.ignore_eos,
        "min_tokens": body.min_tokens,
        "skip_special_tokens": body.skip_special_tokens,
        "include_stop_str_in_output": body.include_stop_str_in_output,
    }
    values = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(
        max_tokens=max_tokens if max_tokens is not None else default_max, logprobs=logprobs, **values
    )


def client_of(body: ChatRequest | CompletionRequest) -> str:
    """Whom the request counts for: the end user that the caller names, in OpenAI's newer or older field."""
    return body.safety_identifier or body.user or ""


def _include_usage(body: ChatRequest | CompletionRequest) -> bool:
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            "stream_options needs stream=true",
            param="stream_options",
            remedy="Send stream=true, or leave it out.",
        )
    return bool(body.stream_options and body.stream_options.include_usage)


def _continuous_usage(body: ChatRequest | CompletionRequest) -> bool:
    """Whether each chunk tells it, as vLLM's do; asked for only with `include_usage`."""
    return bool(body.stream_options and body.stream_options.continuous_usage_stats)


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates read it: text parts joined, `developer` as the system it replaced."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    if content is None and not message.tool_calls:
        raise ApiError(
            f"a {message.role} message has no content",
            param="messages",
            remedy="Send content as text; it may be empty.",
        )
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    if message.tool_calls:
        plain["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
    if (reasoning := message.reasoning_content or message.reasoning) is not None:
        plain["reasoning_content"] = reasoning
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _prompt_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """The prompts of one request; a list of token ids is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(
            "prompt is an empty list", value=prompt, param="prompt", remedy="Send a text or token ids."
        )
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise ApiError(
            f"prompt holds {len(prompt)} prompts, the limit is {MAX_PROMPTS}", value=len(prompt), limit=MAX_PROMPTS,
            param="prompt", remedy="Send them in several requests.",
        )  # fmt: skip
    return prompt


async def maybe_off_loop(size: int, work: Callable[[], T]) -> T:
    """Run `work` here when it is small, else in a thread: other streams must not wait for a long prompt."""
    return work() if size < _INLINE_CHARS else await asyncio.to_thread(work)
