"""Qwen3-Coder's tool calls: tags around function and parameters, values as plain text, typed by the tool's schema.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Ulm
    </parameter>
    </function>
    </tool_call>

The arguments are told parameter by parameter. Source: the chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from workbench.chat_output.json_call import compact_json, parse_json
from workbench.chat_output.pieces import PieceLog

_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>")
_CLOSING = "</parameter>"
_WORDS = {"true": True, "false": False, "none": None, "null": None}


class QwenXmlCall:
    """One call behind ``<tool_call>``. `schemas`: each tool's parameters, by name."""

    def __init__(
        self, log: PieceLog, prefix: str, end: str, schemas: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._log = log
        self._text = prefix  # all but what waits
        self._end = end
        self._schemas = schemas
        self._waiting = ""
        self._name: str | None = None
        self._num_parameters = 0
        self._searched = 0  # characters of what waits that hold no closing tag
        self._is_whole = False

    def push(self, text: str) -> str | None:
        self._waiting += text
        while True:
            if self._is_whole:
                return self._behind()
            advanced = self._function() if self._name is None else self._parameter()
            if advanced is None:
                return None
            if not advanced:
                return self._given_back()

    def _function(self) -> bool | None:
        """True: read on. None: more text is needed. False: this is no call."""
        tag = _FUNCTION.match(self._waiting)
        if tag is None:
            return _or_wait(self._waiting, "<function=")
        self._name = tag.group(1).strip()
        self._log.begin_call(self._name)
        self._take(tag.end())
        return True

    def _parameter(self) -> bool | None:
        tag = _PARAMETER.match(self._waiting)
        if tag is None:
            return self._function_end()
        end = self._waiting.find(_CLOSING, max(tag.end(), self._searched))
        if end < 0:
            self._searched = max(0, len(self._waiting) - len(_CLOSING) + 1)
            return None
        key = tag.group(1).strip()
        assert self._name is not None
        value = _value(_trim(self._waiting[tag.end() : end]), self._schema_of(self._name, key))
        self._log.arguments(
            f"{',' if self._num_parameters else '{'}{compact_json(key)}:{compact_json(value)}"
        )
        self._num_parameters += 1
        self._take(end + len(_CLOSING))
        return True

    def _function_end(self) -> bool | None:
        stripped = self._waiting.lstrip()
        if not stripped.startswith("</function>"):
            tags = ("</function>", "<parameter=")
            return None if any(_or_wait(self._waiting, tag) is None for tag in tags) else False
        self._log.arguments("}" if self._num_parameters else "{}")
        self._log.end_call()
        self._is_whole = True
        self._waiting = stripped[len("</function>") :]
        return True

    def _behind(self) -> str | None:
        """The end marker, where it follows, belongs to the call."""
        stripped = self._waiting.lstrip()
        if stripped.startswith(self._end):
            return stripped[len(self._end) :]
        return None if self._end.startswith(stripped) else self._waiting

    def _take(self, count: int) -> None:
        self._text += self._waiting[:count]
        self._waiting, self._searched = self._waiting[count:], 0

    def _given_back(self) -> str:
        if self._name is None:
            self._log.content(self._text)
        else:
            self._log.break_call(self._text)
        return self._waiting

    def close(self) -> str:
        if self._is_whole:
            return self._waiting if self._waiting.strip() else ""
        return self._given_back()

    def _schema_of(self, name: str, key: str) -> Any:
        properties = self._schemas.get(name, {}).get("properties")
        return properties.get(key) if isinstance(properties, Mapping) else None


def _or_wait(text: str, tag: str) -> bool | None:
    """None while `text` may still become what begins with `tag`; False when it cannot."""
    stripped = text.lstrip()
    return None if tag.startswith(stripped) or (stripped.startswith(tag) and ">" not in stripped) else False


def _trim(text: str) -> str:
    """Without the line breaks that the template writes around a value."""
    return text.removeprefix("\n").removesuffix("\n")


def _value(text: str, schema: Any) -> Any:
    """The text as a value of the parameter's type; as it is where that is a text, unknown, or not what was written."""
    given = schema.get("type") if isinstance(schema, Mapping) else None
    types = {each for each in (given if isinstance(given, list) else [given]) if isinstance(each, str)}
    if isinstance(schema, Mapping) and not types and ({"anyOf", "oneOf", "enum"} & set(schema)):
        types = {"any"}
    if not types or types == {"string"}:
        return text
    word = text.strip()
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    value = parse_json(word)
    return text if value is None or isinstance(value, str) else value
