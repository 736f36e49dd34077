"""One chat request as an engine takes it: prompt, sampling and what to look for in the output; and tools from their JSON.

For the API, and for the Playground and the terminal, which reach engines of this process: the same fields mean the same to all. Boundary: one request; who submits and reads it is the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequestError
from workbench.api.constraints import Constraint
from workbench.api.schema import ChatRequest, parse
from workbench.api.tools import OfferedTools, offered_tools
from workbench.chat_output import OutputSyntax, constrain, output_syntax
from workbench.chat_output.syntax import find_calls
from workbench.errors import ApiError, UnsupportedFieldError

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.sampling_params import SamplingParams
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
class Settled:
    """An output as it was asked for, what it begins with, and what reads it."""

    prompt_ids: list[int]
    constraint: Constraint | None
    syntax: OutputSyntax


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is submitted, and what reads the answer."""

    prompt_ids: list[int]
    params: SamplingParams
    syntax: OutputSyntax
    tokenizer: TokenizerLike


def settle_output(
    tokenizer: TokenizerLike,
    config: EngineConfig,
    prompt_ids: list[int],
    offered: OfferedTools,
    asked: Constraint | None,
) -> Settled:
    """What answers to a prompt have to look like: what the request asked for, calls of its tools, reasoning before both.

    Raises:
        ApiError, InvalidParamsError: what contradicts each other.
        UnsupportedFieldError: tools that may be called, for a model without a way to call them.
    """
    constraint = offered.one_constraint(asked)
    if constraint is not None:
        whole = constrain(
            tokenizer, prompt_ids, constraint.structured, offered.tools, forced=offered.forced,
            parallel_tool_calls=offered.parallel, tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
        )  # fmt: skip
        return Settled(whole.prompt_token_ids, replace(constraint, structured=whole.structured), whole.syntax)
    syntax = output_syntax(
        tokenizer, prompt_ids, offered.tools, parallel_tool_calls=offered.parallel,
        tool_call_parser=config.tool_call_parser, reasoning_parser=config.reasoning_parser,
    )  # fmt: skip
    if offered.tools and syntax.calls is None:
        raise UnsupportedFieldError(
            "this model's template and tokenizer have no tool calls of a known format", value=len(offered.tools),
            param="tools", remedy="Leave tools out, set tool_choice to 'required', or name the format in QUIRE_TOOL_CALL_PARSER.",
        )  # fmt: skip
    return Settled(prompt_ids, None, syntax)


def prepare(
    worker: EngineWorker, messages: Sequence[Message], params: SamplingParams, tools: Sequence[Message] = ()
) -> Prepared:
    """Template and syntax of a request.

    Raises:
        InvalidRequestError: the model has no tokenizer, or its template takes no such messages.
        ApiError, InvalidParamsError, UnsupportedFieldError: as `settle_output`.
    """
    tokenizer, config = worker.tokenizer, worker.config
    if tokenizer is None:
        raise InvalidRequestError(
            "this engine has no tokenizer", remedy="Load a model that has one.", param="model"
        )
    asked = params.structured_outputs
    offered = offered_tools(
        _body(list(tools) or None), lambda: find_calls(tokenizer, config.tool_call_parser)
    )
    settled = settle_output(
        tokenizer, config, tokenizer.apply_chat_template(messages, tools=offered.tools or None), offered,
        None if asked is None else Constraint(asked, "structured_outputs"),
    )  # fmt: skip
    if settled.constraint is not None:
        params = params.with_(structured_outputs=settled.constraint.structured)
    if settled.syntax.shows_special_tokens:
        params = params.with_(skip_special_tokens=False)
    return Prepared(settled.prompt_ids, params, settled.syntax, tokenizer)


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
    return tuple(tool.model_dump(exclude_none=True) for tool in _body(given).tools or ())


def _body(tools: Any) -> ChatRequest:
    return parse(ChatRequest, {"messages": [{"role": "user", "content": ""}], "tools": tools})
