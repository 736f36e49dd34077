"""/v1/responses: OpenAI's Responses API over the same way as chat completions, for clients that keep the conversation themselves.

A body becomes the chat request that means the same, and a refusal of that one is told by the names that the caller wrote.
Nothing is stored, so what would read something stored is refused by name, as are tools that would run here.

Boundary: from items to messages. How an answer looks is `responses_wire`'s, running it `endpoints`' and `generation`'s.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from engine.errors import TypedError
from workbench.api.endpoints import Endpoints, on_current_worker
from workbench.api.intake import read_json, take_request_id
from workbench.api.responses_schema import (
    UNSERVED,
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    InputMessage,
    InputText,
    ReasoningItem,
    ResponsesRequest,
    TextFormat,
)
from workbench.api.responses_wire import ResponsesWire
from workbench.api.schema import ChatRequest, parse
from workbench.api.timeout import take_timeout
from workbench.errors import ApiError
from workbench.host import EngineHost
from workbench.settings import Settings

if TYPE_CHECKING:
    from engine.tokenizer import TokenizerLike
    from engine.worker import EngineWorker

_SAME = (
    "model", "stream", "temperature", "top_p", "parallel_tool_calls", "user", "metadata", "safety_identifier",
    "prompt_cache_key", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "ignore_eos", "cache_salt", "chat_template_kwargs",
)  # fmt: skip
# A chat request's names, and what they are called here.
_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\bresponse_format(\.json_schema)?\b", "text.format"),
        (r"\btools\.(\d+)\.function\b", r"tools.\1"),
        (r"\btool_choice\.function\b", "tool_choice"),
        (r"\bmax_tokens\b", "max_output_tokens"),
    )
)
_PARAMS = {"messages": "input", "prompt": "input"}


class ResponsesRoute:
    """The handler, with what it needs."""

    def __init__(self, endpoints: Endpoints, host: EngineHost, settings: Settings) -> None:
        self._endpoints = endpoints
        self._host = host
        self._max_body_bytes = settings.max_body_bytes

    async def create(self, request: Request) -> Response:
        """POST /v1/responses."""
        arrival_ns = time.monotonic_ns()
        request_id, timeout_s = take_request_id(request), take_timeout(request)
        body = parse(ResponsesRequest, await read_json(request, self._max_body_bytes), UNSERVED)
        head = self._endpoints.head("resp_", request_id, body.model)

        def wire(tokenizer: TokenizerLike) -> ResponsesWire:
            return ResponsesWire(head, told_again(body), tokenizer.token_text, wants_logprobs=_logprobs(body))

        async def start(worker: EngineWorker) -> Response:
            return await self._endpoints.start_chat(worker, chat, request_id, arrival_ns, timeout_s, wire)

        with _named_as_here():
            chat = chat_request(body)
            return await on_current_worker(
                self._host,
                body.model,
                start,
                user=body.user or body.safety_identifier,
                metadata=body.metadata,
            )


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The chat request that asks for the same. Raises ApiError, UnsupportedFieldError."""
    values: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    values["messages"] = _messages(body)
    values["max_tokens"] = body.max_output_tokens
    if _logprobs(body):
        values.update(logprobs=True, top_logprobs=body.top_logprobs)
    if body.tools is not None:
        values["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools
        ]
    choice = body.tool_choice
    if choice is not None:
        values["tool_choice"] = (
            choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}
        )
    if body.text is not None and body.text.format is not None:
        values["response_format"] = _response_format(body.text.format)
    return parse(ChatRequest, values)


def told_again(body: ResponsesRequest) -> dict[str, Any]:
    """The fields of a response that say how it was asked for; what was left out at the value it had."""
    choice, text = body.tool_choice, body.text
    form = text.format if text is not None else None
    return {
        "background": False,
        "conversation": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {
            "format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
        },
        "tool_choice": "auto"
        if choice is None
        else choice
        if isinstance(choice, str)
        else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _logprobs(body: ResponsesRequest) -> bool:
    return bool(body.include) or body.top_logprobs is not None


def _response_format(asked: TextFormat) -> dict[str, Any]:
    if asked.type != "json_schema":
        return {"type": asked.type}
    if asked.name is None or asked.schema_ is None:
        missing = "text.format.name" if asked.name is None else "text.format.schema"
        raise ApiError(f"field {missing!r} is missing", param=missing, remedy=f"Send {missing}.")
    schema = asked.model_dump(exclude={"type"}, by_alias=True, exclude_none=True)
    return {"type": "json_schema", "json_schema": schema}


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    first = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if isinstance(body.input, str):
        return [*first, {"role": "user", "content": body.input}]
    return [*first, *_conversation(body.input)]


def _conversation(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Messages; thoughts, text and calls of one answer, which are items of their own, together again."""
    messages: list[dict[str, Any]] = []
    answer: dict[str, Any] | None = None  # the assistant's message that the next item may belong to
    for item in items:
        match item:
            case FunctionOutputItem():
                tool = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
                messages.append(tool)
                answer = None
                continue
            case InputMessage() if item.role != "assistant":
                messages.append({"role": item.role, "content": _text(item.content)})
                answer = None
                continue
        if answer is None or _begins_anew(item, answer):
            answer = {"role": "assistant"}
            messages.append(answer)
        match item:
            case InputMessage():
                answer["content"] = _text(item.content)
            case ReasoningItem():
                answer["reasoning_content"] = "\n".join(part.text for part in item.content or item.summary)
            case FunctionCallItem():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                answer.setdefault("tool_calls", []).append(call)
    for message in messages:
        message.setdefault("content", "")  # thoughts alone, of an answer that was cut
    return messages


def _begins_anew(item: InputItem, answer: dict[str, Any]) -> bool:
    """Whether an answer has got behind where `item` would stand in it."""
    if isinstance(item, FunctionCallItem):
        return False
    return (
        len(answer) > 1 if isinstance(item, ReasoningItem) else "content" in answer or "tool_calls" in answer
    )


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


@contextmanager
def _named_as_here() -> Iterator[None]:
    """Refusals of the chat request by the names of this one."""
    try:
        yield
    except TypedError as error:
        for pattern, name in _NAMES:
            error.message = pattern.sub(name, error.message)
            error.remedy = error.remedy and pattern.sub(name, error.remedy)
            error.param = error.param and pattern.sub(name, error.param)
        error.param = _PARAMS.get(error.param or "", error.param)
        raise
