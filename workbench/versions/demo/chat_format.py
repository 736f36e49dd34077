"""How a conversation becomes tokens: special tokens, the chat template, and the training encoding.

`CHAT_TEMPLATE` (jinja, shipped with the model) and `render` (Python, used in training) write the same
text; a test holds them together. `encode` also says which tokens are answers, because only those are
trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

Message = dict[str, Any]

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SYSTEM, USER, ASSISTANT, TOOL = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"
TOOL_CALL, TOOL_CALL_END = "<|tool_call|>", "<|/tool_call|>"
SPECIAL_TOKENS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT, TOOL, TOOL_CALL, TOOL_CALL_END)
"""In order of their ids, from 0."""

CHAT_TEMPLATE = """\
{%- macro signature(tool) -%}
{%- set f = tool.function if tool.function is defined else tool -%}
{{ f.name }}({% for p in (f.parameters.properties if f.parameters is defined and f.parameters.properties is defined \
else {}) %}{{ p }}{% if not loop.last %}, {% endif %}{% endfor %}){% if f.description %}: {{ f.description }}{% endif %}
{%- endmacro -%}
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' -%}
<|bos|>
{%- if system or tools -%}
<|system|>{{ system }}
{%- if tools -%}
{%- if system %}{{ '\\n' }}{% endif -%}tools:
{%- for tool in tools %}{{ '\\n' }}{{ signature(tool) }}{% endfor -%}
{%- endif -%}
<|end|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' and loop.first -%}
{%- elif message.role == 'assistant' -%}
<|assistant|>{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
{%- set f = call.function -%}
<|tool_call|>{"name":{{ f.name | tojson }},"arguments":\
{%- if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson(separators=(',', ':')) }}{% endif -%}
}<|/tool_call|>
{%- endfor -%}
<|end|>
{%- elif message.role in ['system', 'user', 'tool'] -%}
{{ '<|' + message.role + '|>' }}{{ message.content }}<|end|>
{%- else -%}
{{ raise_exception('role must be system, user, assistant or tool, got: ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


class Segment(NamedTuple):
    """A piece of the rendered text, and whether it is an answer that training learns."""

    text: str
    is_answer: bool


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A parsed tool call."""

    name: str
    arguments: Any


class Encoding(Protocol):
    """What `tokenizers.Tokenizer.encode` returns, as far as it is used here."""

    @property
    def ids(self) -> list[int]: ...


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that encoding needs."""

    def encode(self, sequence: str, *, add_special_tokens: bool = ...) -> Encoding: ...


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Token ids [T] and, for each, whether it is part of an answer."""

    ids: list[int]
    is_answer: list[bool]


def tool_signature(tool: dict[str, Any]) -> str:
    """One line per tool, as the model sees it: `name(parameter, ...): description`."""
    function = tool.get("function", tool)
    names = ", ".join(function.get("parameters", {}).get("properties", {}))
    description = function.get("description", "")
    return f"{function['name']}({names})" + (f": {description}" if description else "")


def tool_call_text(call: dict[str, Any]) -> str:
    """One tool call with its tokens; string arguments are written as they are."""
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, separators=(",", ":"), ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'{TOOL_CALL}{{"name":{name},"arguments":{arguments}}}{TOOL_CALL_END}'


def answer_text(message: Message) -> str:
    """What the model writes for an assistant message, without the end token."""
    return (message.get("content") or "") + "".join(
        tool_call_text(call) for call in message.get("tool_calls") or []
    )


def split_tool_call(text: str) -> ToolCall | None:
    """The single call that an answer consists of, or None where it is anything else."""
    body = text.strip()
    if not (body.startswith(TOOL_CALL) and body.endswith(TOOL_CALL_END)):
        return None
    try:
        data = json.loads(body[len(TOOL_CALL) : -len(TOOL_CALL_END)])
    except ValueError:
        return None
    if (
        not isinstance(data, dict)
        or data.keys() != {"name", "arguments"}
        or not isinstance(data["name"], str)
    ):
        return None
    return ToolCall(data["name"], data["arguments"])


def render(messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[Segment]:
    """A whole conversation as segments; joined, they are what the chat template writes."""
    segments = [Segment(BOS, False)]
    rest = list(messages)
    system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else ""
    if system or tools:
        listed = "".join("\n" + tool_signature(tool) for tool in tools)
        segments.append(
            Segment(
                SYSTEM + system + (("\n" if system else "") + "tools:" + listed if tools else "") + END, False
            )
        )
    for message in rest:
        if message["role"] == "assistant":
            segments += [Segment(ASSISTANT, False), Segment(answer_text(message) + END, True)]
        else:
            segments.append(Segment(f"<|{message['role']}|>{message['content']}{END}", False))
    return segments


def encode(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
) -> EncodedChat:
    """The training encoding. Segments meet at special tokens, so it equals encoding the whole text at once."""
    ids: list[int] = []
    is_answer: list[bool] = []
    for segment in render(messages, tools):
        piece = tokenizer.encode(segment.text, add_special_tokens=False).ids
        ids += piece
        is_answer += [segment.is_answer] * len(piece)
    return EncodedChat(ids, is_answer)
