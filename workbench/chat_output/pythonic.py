"""Tool calls as Python writes them: ``[get_weather(city="Ulm"), get_time()]``, with literal values by keyword.

Each call is told when it is closed. Nothing is evaluated: the text is parsed and must hold literals alone.
Source: Meta's prompt format of Llama 3.2 and 4; ToolACE.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from workbench.chat_output.bodies import Accepts
from workbench.chat_output.json_call import compact_json
from workbench.chat_output.pieces import PieceLog

_MARK = re.compile(r"""["'\\(){}\[\]]""")
_HEAD = re.compile(r"\s*([A-Za-z_][\w.]*)\s*")
_HEAD_SO_FAR = re.compile(r"\s*(?:[A-Za-z_][\w.]*\s*)?")
_MAX_HEAD = 256  # characters: a longer one is none
_CONSTANTS = {"true": True, "false": False, "null": None}  # JSON's names, which models mix in


class PythonicCalls:
    """A list of calls; the first character that comes is its opening bracket."""

    def __init__(self, log: PieceLog, prefix: str, accepts: Accepts) -> None:
        self._log = log
        self._prefix = prefix  # what the call at hand gives back before itself
        self._accepts = accepts
        self._text = ""  # of the call at hand, or what stands between two
        self._scan: _CallScan | None = None  # within a call's brackets
        self._is_behind = False  # a call: a comma or the end of the list comes
        self._is_open = False
        self._is_over = False

    def push(self, text: str) -> str | None:
        rest: str | None = text
        if not self._is_open:
            self._is_open, self._prefix, rest = True, self._prefix + text[:1], text[1:]
        while rest is not None and not self._is_over:
            rest = self._between(rest) if self._is_behind else self._call(rest)
        return rest

    def _call(self, text: str) -> str | None:
        """Read the call at hand; what lies behind it, None while it is open."""
        self._text += text
        if self._scan is None:
            bracket = self._text.find("(", 0, _MAX_HEAD)
            if bracket < 0:
                return None if self._may_be_a_head() else self._given_back()
            head = _HEAD.fullmatch(self._text, 0, bracket)
            if head is None or not self._accepts(head.group(1)):
                return self._given_back()
            self._scan, text = _CallScan(), self._text[bracket:]
        end = self._scan.feed(text)
        if end is None:
            return None
        behind = len(text) - end
        call = _parse(self._text[: len(self._text) - behind].strip())
        if call is None:
            return self._given_back()
        self._log.begin_call(call[0])
        self._log.arguments(call[1])
        self._log.end_call()
        self._prefix, self._text, self._scan, self._is_behind = "", "", None, True
        return text[end:]

    def _may_be_a_head(self) -> bool:
        return len(self._text) < _MAX_HEAD and _HEAD_SO_FAR.fullmatch(self._text) is not None

    def _given_back(self) -> str:
        self._is_over = True
        self._log.content(self._prefix)
        return self._text

    def _between(self, text: str) -> str | None:
        self._text += text
        stripped = self._text.lstrip()
        if not stripped:
            return None
        whole, self._text = self._text, ""
        if stripped[0] == ",":
            self._prefix, self._is_behind = whole[: len(whole) - len(stripped) + 1], False
            return stripped[1:]
        self._is_over = True
        return stripped[1:] if stripped[0] == "]" else whole

    def close(self) -> str:
        self._log.content(self._prefix)
        return self._text if self._text.strip() or not self._is_behind else ""


class _CallScan:
    """Finds the bracket that closes a call's opening one; text comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._quote = ""
        self._skip = 0

    def feed(self, text: str) -> int | None:
        at, self._skip = self._skip, max(self._skip - len(text), 0)
        while (mark := _MARK.search(text, at)) is not None:
            at, char = mark.end(), mark.group()
            if self._quote:
                if char == "\\":
                    at += 1
                    self._skip = max(at - len(text), 0)
                elif char == self._quote:
                    self._quote = ""
            elif char in "\"'":
                self._quote = char
            elif char != "\\":
                self._depth += 1 if char in "([{" else -1
                if self._depth <= 0:
                    return at
        return None


def _parse(text: str) -> tuple[str, str] | None:
    """Name and arguments of one call; None where it is none, or holds more than literals by keyword."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments = {word.arg: _value(word.value) for word in call.keywords}
        if None in arguments:  # **more
            return None
        return ast.unparse(call.func), compact_json(arguments)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.List):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {ast.literal_eval(key): _value(value) for key, value in zip(node.keys, node.values) if key}
    return ast.literal_eval(node)
