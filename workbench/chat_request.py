"""One chat request as an engine takes it: prompt, sampling and what to look for in the output; and tools from their JSON.

For the Playground and the terminal, which reach engines of this process; it means what the same fields mean to
/v1/chat/completions. Boundary: one request; who submits and reads it is the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequestError
from workbench.api.schema import ChatRequest, parse
from workbench.chat_output import OutputSyntax, begin_constrained, output_syntax
from workbench.errors import ApiError, UnsupportedFieldError

if TYPE_CHECKING:
    from engine.sampling_params import SamplingParams
    from engine.structured_outputs import StructuredOutputsParams
    from engine.tokenizer import TokenizerLike
    from engine.worker import EngineWorker

Message = Mapping[str, Any]
Tools = tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How answers are sampled, and which tools they may call."""

    params: SamplingParams
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is submitted, and what reads the answer."""

    prompt_ids: list[int]
    params: SamplingParams
    syntax: OutputSyntax
    tokenizer: TokenizerLike


def prepare(
    worker: EngineWorker, messages: Sequence[Message], params: SamplingParams, tools: Sequence[Message] = ()
) -> Prepared:
    """Template and syntax of a request. A constrained output begins at once, without reasoning, and calls no tools.

    Raises:
        InvalidRequestError: the model has no tokenizer, or its template takes no such messages.
        UnsupportedFieldError: tools, for a model without a way to call them.
    """
    tokenizer = worker.tokenizer
    if tokenizer is None:
        raise InvalidRequestError(
            "this engine has no tokenizer", remedy="Load a model that has one.", param="model"
        )
    prompt_ids, config = tokenizer.apply_chat_template(messages, tools=list(tools) or None), worker.config
    if params.structured_outputs is not None:
        begun = begin_constrained(tokenizer, prompt_ids, "", config.reasoning_parser)
        return Prepared(begun, params, OutputSyntax(), tokenizer)
    syntax = output_syntax(
        tokenizer, prompt_ids, tools, tool_call_parser=config.tool_call_parser, reasoning_parser=config.reasoning_parser
    )  # fmt: skip
    if tools and syntax.calls is None:
        raise UnsupportedFieldError(
            "this model has no tool calls of a known format", value=len(tools), param="tools",
            remedy="Leave tools out, or choose a model that was trained to call tools.",
        )  # fmt: skip
    if syntax.shows_special_tokens:
        params = params.with_(skip_special_tokens=False)
    return Prepared(prompt_ids, params, syntax, tokenizer)


def read_tools(text: str) -> Tools:
    """Tool definitions from JSON, checked as the API checks a request's.

    Raises:
        ApiError: no JSON, or no list of OpenAI's tool definitions, by its path.
    """
    if not text.strip():
        return ()
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(
            f"tools must be JSON: {error}", param="tools", remedy="Write a list of tools."
        ) from None
    asked = {"messages": [{"role": "user", "content": ""}], "tools": given}
    return tuple(tool.model_dump(exclude_none=True) for tool in parse(ChatRequest, asked).tools or ())


def check_tools(structured: StructuredOutputsParams | None, tools: Tools) -> None:
    """Raises ApiError where an output of the form that is asked for could call none of them."""
    if structured is not None and tools:
        raise ApiError(
            "an output of that form calls no tools", param="tools", remedy="Leave one of the two out."
        )
