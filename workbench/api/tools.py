"""Which tools a chat request offers, whether it forces a call, and the grammar that does.

A forced call is constrained from its first token, or from the end of the reasoning before it. Where a model writes calls as JSON
objects (Hermes, Qwen, Llama 3, the bundled model), the output is that object, so one call. For all others it is as in vLLM:
`required` makes the output a JSON list of calls, a named function makes it that function's arguments. A call that nothing forces is
constrained behind its marker: where a tool is strict, or where the answer has to look like something.

Boundary: from a checked body to what template, grammar and parser need.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine.structural_tag import json_part
from engine.structured_outputs import StructuredOutputsParams
from workbench.api.constraints import Constraint, check_strict, schemas_in
from workbench.api.schema import ChatRequest, NamedToolChoice, Tool
from workbench.chat_output import ForcedCall, as_part
from workbench.chat_output.formats import CallFormat, json_arguments, json_list, json_object
from workbench.errors import ApiError, UnsupportedFieldError

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_HOISTED = ("$defs", "definitions")  # what references in a schema point to, from its root


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """The tools of one request; without any, it is empty."""

    tools: list[dict[str, Any]] = field(default_factory=list)  # as templates read them
    parallel: bool = True
    forced: ForcedCall | None = None
    constraint: Constraint | None = None  # what makes calls follow their schemas
    call: Callable[[], dict[str, Any]] | None = None  # one among other text, as a part of it; None: not known

    def one_constraint(self, asked: Constraint | None) -> Constraint | None:
        """That of the whole output: calls, or what the request asked for; either, where both go together. Raises ApiError where not."""
        if asked is None or not self.tools:
            return asked or self.constraint
        if self.forced is not None or self.call is None:
            raise ApiError(
                f"{asked.param} and tools contradict each other: an output of that form calls none", value=len(self.tools),
                limit=0, param=asked.param, remedy="Send one of them, or tool_choice='none'.",
            )  # fmt: skip
        calls = {
            "type": "tags_with_separator", "separator": "\n", "tags": [self.call()], "at_least_one": True,
            "stop_after_first": not self.parallel,
        }  # fmt: skip
        return Constraint(_tag({"type": "or", "elements": [as_part(asked.structured), calls]}), asked.param)


def offered_tools(body: ChatRequest, own_format: Callable[[], CallFormat | None]) -> OfferedTools:
    """The body's tools. `own_format`: the model's.

    Raises:
        ApiError: a choice without tools, or of a tool that is not among them; a schema that is not strict where it says so.
        UnsupportedFieldError: strict arguments of a call that nothing forces, of a model whose calls have no marker.
    """
    choice = body.tool_choice
    if choice not in (None, "none") and not body.tools:
        raise ApiError(
            f"tool_choice={_shown(choice)} needs tools", value=_shown(choice), limit="none", param="tool_choice",
            remedy="Send tools, or leave tool_choice out.",
        )  # fmt: skip
    tools = body.tools or []
    _check(tools)
    if not tools or choice == "none":
        return OfferedTools()
    plain = [tool.model_dump(exclude_none=True) for tool in tools]
    parallel = body.parallel_tool_calls is not False
    if choice in (None, "auto"):
        return _free(plain, parallel, tools, own_format())
    return _forced(plain, parallel, tools, choice, own_format())


def _free(
    plain: list[dict[str, Any]], parallel: bool, tools: list[Tool], own: CallFormat | None
) -> OfferedTools:
    """Tools that may be called: the arguments of strict ones follow their schemas."""
    call = None
    if own is not None and own.marker and own.arguments_key is not None and own.opening:
        schemas = [tool if tool.function.strict else _any_arguments(tool) for tool in tools]
        call = partial(_call_part, own, schemas)
    strict = next((i for i, tool in enumerate(tools) if tool.function.strict), None)
    if strict is None:
        return OfferedTools(plain, parallel, call=call)
    where = f"tools.{strict}.function"
    if own is None or call is None:
        raise UnsupportedFieldError(
            f"strict arguments of {tools[strict].function.name!r} are not supported where the model may also answer in text",
            value=True, limit=False, param=f"{where}.strict",
            remedy="Set tool_choice to 'required' or to the function, or leave strict out.",
        )  # fmt: skip
    found = {
        "type": "triggered_tags", "triggers": [own.marker], "tags": [call()], "stop_after_first": not parallel,
    }  # fmt: skip
    return OfferedTools(plain, parallel, constraint=Constraint(_tag(found), f"{where}.parameters"), call=call)


def _forced(
    plain: list[dict[str, Any]], parallel: bool, tools: list[Tool], choice: Any, own: CallFormat | None
) -> OfferedTools:
    """Tools of which one must be called: any of them, or the one that `choice` names."""
    where = "tools"
    if isinstance(choice, NamedToolChoice):
        index, tool = _named(tools, choice.function.name)
        where, tools = f"tools.{index}.function.parameters", [tool]
    key = own.arguments_key if own is not None else None
    if own is not None and key is not None:
        schema = _one_call(tools, key)
        forced = ForcedCall(json_object(), own.opening, _call_part(own, tools) if own.opening else None)
    elif isinstance(choice, NamedToolChoice):
        schema, forced = _parameters(tools[0]), ForcedCall(json_arguments(tools[0].function.name))
    else:
        schema, forced = _list_of_calls(tools, parallel), ForcedCall(json_list())
    # A model has its habits of white space in calls of its own form; elsewhere it need not have any.
    structured = StructuredOutputsParams(json=schema, any_whitespace=key is not None)  # type: ignore[arg-type]  # kept as text
    return OfferedTools(plain, parallel, forced, Constraint(structured, where))


def _call_part(own: CallFormat, tools: list[Tool]) -> dict[str, Any]:
    """A call in the model's own form, with what stands around it."""
    assert own.arguments_key is not None
    call = json_part(_one_call(tools, own.arguments_key))
    return {"type": "tag", "begin": own.opening, "content": call, "end": own.end}


def _any_arguments(tool: Tool) -> Tool:
    return tool.model_copy(update={"function": tool.function.model_copy(update={"parameters": None})})


def _tag(part: dict[str, Any]) -> StructuredOutputsParams:
    return StructuredOutputsParams(structural_tag=json.dumps({"format": part}))


def _check(tools: list[Tool]) -> None:
    names = [tool.function.name for tool in tools]
    for index, tool in enumerate(tools):
        where = f"tools.{index}.function"
        if names.index(tool.function.name) != index:
            raise ApiError(
                f"two tools have the name {tool.function.name!r}", value=tool.function.name, param=f"{where}.name",
                remedy="Give each tool a name of its own.",
            )  # fmt: skip
        if tool.function.strict:
            check_strict(_parameters(tool), f"{where}.parameters")


def _named(tools: list[Tool], name: str) -> tuple[int, Tool]:
    for index, tool in enumerate(tools):
        if tool.function.name == name:
            return index, tool
    raise ApiError(
        f"tool_choice names {name!r}, which is none of the tools", value=name, param="tool_choice.function.name",
        limit=[tool.function.name for tool in tools], remedy="Name one of the tools.",
    )  # fmt: skip


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or _ANY_OBJECT


def _list_of_calls(tools: list[Tool], parallel: bool) -> dict[str, Any]:
    """The schema of ``[{"name": …, "parameters": …}, …]``."""
    call = _one_call(tools, "parameters")
    hoisted = {key: call.pop(key) for key in _HOISTED if key in call}
    return {"type": "array", "minItems": 1, **({} if parallel else {"maxItems": 1}), "items": call, **hoisted}


def _one_call(tools: list[Tool], arguments_key: str) -> dict[str, Any]:
    """The schema of ``{"name": …, "parameters": …}``. Definitions move to its root, where references look for them."""
    definitions: dict[str, dict[str, Any]] = {}
    calls = []
    for index, tool in enumerate(tools):
        parameters, where = dict(_parameters(tool)), f"tools.{index}.function.parameters"
        _check_references(parameters, where)
        for key in _HOISTED:
            inner = parameters.pop(key) if isinstance(parameters.get(key), dict) else {}
            for name, value in inner.items():
                if definitions.setdefault(key, {}).setdefault(name, value) != value:
                    raise ApiError(
                        f"two tools define {key}.{name} in different ways", value=name, param=f"{where}.{key}.{name}",
                        remedy="Give the definitions different names.",
                    )  # fmt: skip
        named = {"name": {"const": tool.function.name}, arguments_key: parameters}
        calls.append(
            {"type": "object", "properties": named, "required": list(named), "additionalProperties": False}
        )
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), **definitions}


def _check_references(parameters: dict[str, Any], where: str) -> None:
    """Within a call a schema is no root: only its definitions are found from there."""
    for path, part in schemas_in(parameters, where):
        target = part.get("$ref")
        if isinstance(target, str) and not target.startswith(tuple(f"#/{key}/" for key in _HOISTED)):
            raise UnsupportedFieldError(
                f"the reference {target!r} is not supported in a call that is forced", value=target,
                limit=[f"#/{key}/…" for key in _HOISTED], param=path, remedy="Refer to $defs.",
            )  # fmt: skip


def _shown(choice: Any) -> Any:
    return choice.function.name if isinstance(choice, NamedToolChoice) else choice
