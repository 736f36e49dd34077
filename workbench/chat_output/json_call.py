"""Reading a tool call that is written as JSON, as it grows: its name as soon as it is certain, then its arguments verbatim.

Boundary: one JSON object. What stands around it (markers, lists) is `bodies`'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from workbench.chat_output.pieces import PieceLog

_ARGUMENTS_KEYS = ("arguments", "parameters")
_KEYS = ("name", *_ARGUMENTS_KEYS, "type", "id", "function")
_MARK = re.compile(r'["\\{}\[\]]')
_NAME = r'"(?:[^"\\]|\\.){0,256}"'  # bounded: an output that never closes it is not read again and again
# The common order: the arguments can be told as they come.
_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*({_NAME})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)')
_FIRST_KEY = re.compile(r'\s*(?:\{\s*(?:"([^"]{0,64})("?))?)?')


class JsonScan:
    """Finds where a JSON value that is open `depth` brackets deep ends; text comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._skip = 0  # characters of the next text that a backslash took

    def feed(self, text: str) -> int | None:
        """Index behind the bracket that closes the last one; None while it is open."""
        at, self._skip = self._skip, max(self._skip - len(text), 0)
        while (mark := _MARK.search(text, at)) is not None:
            at, char = mark.end(), mark.group()
            if char == '"':
                self._in_string = not self._in_string
            elif char == "\\":
                at += 1
                self._skip = max(at - len(text), 0)
            elif not self._in_string:
                self._depth += 1 if char in "{[" else -1
                if self._depth <= 0:
                    return at
        return None


class JsonArguments:
    """The arguments of the call that began last: a JSON object, told as it comes."""

    def __init__(self, log: PieceLog) -> None:
        self._log = log
        self._scan = JsonScan()
        self._texts: list[str] = []
        self.is_whole = False

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def push(self, text: str) -> str | None:
        """Take text in; what lies behind the object, None while it is open."""
        end = self._scan.feed(text)
        own = text if end is None else text[:end]
        self._texts.append(own)
        self._log.arguments(own)
        if end is None:
            return None
        self.is_whole = isinstance(parse_json(self.text), dict)
        if self.is_whole:
            self._log.end_call()
        return text[end:]


class JsonCall:
    """One call: ``{"name": …, "arguments": {…}}``, also with `parameters`, other keys, another order, arguments as a text.

    `accepts`: whether a call of that name is one. `is_certain`: a marker said that a call comes; without one an object whose
    first key is no call's is given up at once, since it is an answer that somebody reads.

    When it is over, one of three holds: `is_whole`; `has_begun`, told of but broken, `text` is what it was; or neither, nothing
    was told and all of the text is given back as what lies behind.
    """

    def __init__(self, log: PieceLog, accepts: Callable[[str], bool], *, is_certain: bool = True) -> None:
        self._log = log
        self._accepts = accepts
        self._is_certain = is_certain
        self._head = ""  # what stands before the arguments
        self._scan = JsonScan()
        self._arguments: JsonArguments | None = None
        self.has_begun = False
        self.is_whole = False

    @property
    def text(self) -> str:
        """As the model wrote it, up to the end of its arguments."""
        return self._head + (self._arguments.text if self._arguments else "")

    def push(self, text: str) -> str | None:
        """Take text in; what lies behind the call once it is over, None before."""
        if self.is_whole:
            return self._tail(text)
        if self._arguments is None:
            self._head += text
            head = _HEAD.match(self._head)
            name = parse_json(head.group(1)) if head else None
            if head is None or not isinstance(name, str) or not self._accepts(name):
                return self._without_head(text)
            self._begin(name)
            self._arguments = JsonArguments(self._log)
            self._head, text = self._head[: head.end()], self._head[head.end() :]
        rest = self._arguments.push(text)
        if rest is None:
            return None
        self.is_whole = self._arguments.is_whole
        if not self.is_whole:
            return rest
        self._scan = JsonScan(depth=1)
        return self._tail(rest)

    def _begin(self, name: str) -> None:
        self.has_begun = True
        self._log.begin_call(name)

    def _tail(self, text: str) -> str | None:
        """Behind the arguments: further keys, and the call's own bracket."""
        end = self._scan.feed(text)
        return None if end is None else text[end:]

    def _without_head(self, text: str) -> str | None:
        """In another order the call is told when it is whole."""
        if not self._may_be_a_call():
            return self._head
        end = self._scan.feed(text)
        if end is None:
            return None
        name, arguments = _name_and_arguments(self._head[: len(self._head) - len(text) + end])
        if name is None or not self._accepts(name):
            return self._head
        self._begin(name)
        self._log.arguments(arguments)
        self._log.end_call()
        self.is_whole = True
        return text[end:]

    def _may_be_a_call(self) -> bool:
        seen = _FIRST_KEY.match(self._head)
        assert seen is not None, "it matches the empty text"
        key, is_complete = seen.group(1), seen.group(2) == '"'
        if key is None:  # before it, only white space and the bracket may stand
            return seen.end() == len(self._head)
        if self._is_certain:
            return True
        return key in _KEYS if is_complete else any(each.startswith(key) for each in _KEYS)


def parse_json(text: str) -> Any:
    """The value; None where it is no JSON (which has neither NaN nor Infinity)."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def compact_json(value: Any) -> str:
    """Raises TypeError or ValueError for what JSON does not have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _name_and_arguments(text: str) -> tuple[str | None, str]:
    """The call in a whole object. Arguments given as a text are what that text says."""
    data = parse_json(text)
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return None, ""
    arguments: Any = next((data[key] for key in _ARGUMENTS_KEYS if key in data), {})
    if isinstance(arguments, str):
        return (data["name"], arguments) if isinstance(parse_json(arguments), dict) else (None, "")
    return (data["name"], compact_json(arguments)) if isinstance(arguments, dict) else (None, "")
