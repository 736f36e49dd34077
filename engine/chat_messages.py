"""Chat messages as templates expect them: checked, content a text, tool-call arguments values.

Clients send OpenAI's shapes (content as parts, arguments as JSON text); the templates that come with models read plain
texts and objects. Boundary: shapes of messages. Rendering is in ``engine.tokenizer``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequestError

Message = Mapping[str, Any]
# What a renderer sets itself; among them parameters of transformers' apply_chat_template that are no template's variables.
_RESERVED = frozenset({
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation in the form that chat templates read. The messages given are left as they are.

    Raises:
        InvalidRequestError: naming the message and what is wrong with it.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError(
            "messages must be a non-empty list of {role, content} objects", value=messages, param="messages"
        )
    return [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def refuse_reserved(chat_template_kwargs: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError where a template variable has the name of what the renderer sets itself."""
    taken = sorted(_RESERVED.intersection(chat_template_kwargs))
    if taken:
        raise InvalidRequestError(
            f"chat_template_kwargs cannot set {', '.join(taken)}",
            value=taken,
            remedy="Name variables of the model's template only, such as enable_thinking.",
            param=f"chat_template_kwargs.{taken[0]}",
        )


def _plain_message(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"{where} must be an object with role and content, got {type(message).__name__}",
            value=message,
            param=where,
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(
            f"{where}.role must be a text, got {role!r}", value=role, param=f"{where}.role"
        )
    plain = dict(message)
    calls = message.get("tool_calls")
    if calls is not None:
        plain["tool_calls"] = _plain_tool_calls(calls, f"{where}.tool_calls")
    plain["content"] = _plain_content(message.get("content"), f"{where}.content", may_be_empty=bool(calls))
    return plain


def _plain_content(content: Any, where: str, *, may_be_empty: bool) -> str:
    """Text parts are joined by newlines; what is no text is refused rather than dropped."""
    if content is None and may_be_empty:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise InvalidRequestError(
            f"{where} must be a text or a list of text parts, got {type(content).__name__}",
            value=content,
            param=where,
        )
    texts: list[str] = []
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"{where} has a part of type {part.get('type')!r}; this engine reads text only",
                value=part.get("type"),
                limit="text",
                param=where,
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _plain_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise InvalidRequestError(f"{where} must be a list of objects", value=calls, param=where)
    plain = []
    for call in calls:
        copy = dict(call)
        function = copy.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            copy["function"] = {**function, "arguments": _parsed(function["arguments"])}
        plain.append(copy)
    return plain


def _parsed(arguments: str) -> Any:
    """The arguments as values; a model's own broken call stays in its history as it was."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments
