"""Bodies of tool calls in JSON: what stands between a marker and the text that goes on, in the formats of the field.

A body takes the text behind its marker until it is over. A call that cannot be read is given back: told of, as a broken call;
not told of, its marker as content and what follows it as text like any other. So every chunking of a text gives the same.

Boundary: JSON. Qwen3-Coder's tags are in `qwen_xml`, Python's calls in `pythonic`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from workbench.chat_output.json_call import JsonArguments, JsonCall
from workbench.chat_output.pieces import PieceLog

Accepts = Callable[[str], bool]


class CallBody(Protocol):
    """Reads calls behind a marker."""

    def push(self, text: str) -> str | None:
        """Take text in; what lies behind the calls once they are over, None before."""
        ...

    def close(self) -> str:
        """The output ended; the text to give back."""
        ...


def held_back(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if marker.startswith(text[-n:])), 0)


class TaggedCall:
    """Hermes, Qwen: one call, then the end marker, which ends it wherever it stands.

    A call whose arguments are whole stands, whether or not the end marker follows.
    """

    def __init__(self, log: PieceLog, prefix: str, end: str, accepts: Accepts) -> None:
        self._log = log
        self._prefix = prefix
        self._end = end
        self._call = JsonCall(log, accepts)
        self._text = ""  # all but what waits
        self._waiting = ""  # what may be the beginning of the end marker
        self._is_read = False  # the call's object is closed

    def push(self, text: str) -> str | None:
        text, self._waiting = self._waiting + text, ""
        before, found, after = text.partition(self._end)
        if not self._is_read:
            keep = 0 if found else held_back(before, self._end)
            own, self._waiting = before[: len(before) - keep], before[len(before) - keep :]
            self._text += own
            rest = self._call.push(own)
            if rest is None:
                return self._ended(after) if found else None
            if not self._call.is_whole:
                return self._given_back(rest + self._waiting + found + after)
            self._is_read = True
            before, self._waiting = rest + self._waiting, ""
        if found and not before.strip():
            return after
        if not found and self._end.startswith(before.lstrip()):
            self._waiting = before
            return None
        return before + found + after

    def _ended(self, after: str) -> str:
        """The end marker came before the call's object was closed."""
        if self._call.is_whole:
            return after
        if self._call.has_begun:
            self._log.break_call(self._prefix + self._text + self._end)
            return after
        self._log.content(self._prefix)
        return self._text + self._end + after

    def _given_back(self, rest: str) -> str:
        if self._call.has_begun:
            self._log.break_call(self._prefix + self._call.text)
        else:
            self._log.content(self._prefix)
        return rest

    def close(self) -> str:
        if self._call.is_whole:
            return self._waiting if self._waiting.strip() and self._is_read else ""
        if self._call.has_begun:
            self._log.break_call(self._prefix + self._text + self._waiting)
            return ""
        self._log.content(self._prefix)
        return self._text + self._waiting


class CallList:
    """Calls one after the other: Llama 3's ``{…}; {…}``, Mistral's ``[{…}, {…}]``. `opening` and `closing` may be empty."""

    def __init__(
        self, log: PieceLog, prefix: str, accepts: Accepts, *, opening: str, separator: str, closing: str,
        is_certain: bool,
    ) -> None:  # fmt: skip
        self._log = log
        self._accepts = accepts
        self._separator = separator
        self._closing = closing
        self._is_certain = is_certain
        self._prefix = prefix  # what the call at hand gives back before itself
        self._expected = opening  # before the call at hand
        self._between = ""  # text between calls that is not understood yet
        self._call: JsonCall | None = None
        self._text = ""  # of the call at hand
        self._is_over = False
        if not opening:
            self._begin()

    def _begin(self) -> None:
        self._call = JsonCall(self._log, self._accepts, is_certain=self._is_certain)
        self._text = ""

    def push(self, text: str) -> str | None:
        rest: str | None = text
        while rest is not None and not self._is_over:
            rest = self._between_calls(rest) if self._call is None else self._in_call(self._call, rest)
        return rest

    def _in_call(self, call: JsonCall, text: str) -> str | None:
        self._text += text
        rest = call.push(text)
        if rest is None:
            return None
        if call.is_whole:
            self._call, self._prefix, self._expected = None, "", self._separator
            return rest
        self._is_over = True
        if call.has_begun:
            self._log.break_call(self._prefix + call.text)
        else:
            self._log.content(self._prefix)
        return rest

    def _between_calls(self, text: str) -> str | None:
        """What lies behind the opening, the separator (then a call has begun) or the closing; None while none is there."""
        self._between += text
        stripped = self._between.lstrip()
        if not stripped:
            return None
        whole, self._between = self._between, ""
        if stripped.startswith(self._expected):
            rest = stripped[len(self._expected) :]
            self._prefix += whole[: len(whole) - len(rest)]
            self._begin()
            return rest
        self._is_over = True
        if self._closing and stripped.startswith(self._closing) and not self._prefix:
            return stripped[len(self._closing) :]
        self._log.content(self._prefix)
        return whole

    def close(self) -> str:
        if self._call is None:
            self._log.content(self._prefix)
            return self._between if self._between.strip() else ""
        if self._call.is_whole:
            return ""
        if self._call.has_begun:
            self._log.break_call(self._prefix + self._text)
            return ""
        self._log.content(self._prefix)
        return self._text


class NamedCall:
    """A call whose arguments stand behind its name: Mistral's ``name[ARGS]{…}``; or whose name was known before, ``{…}``."""

    # An id may stand between name and arguments; it is the model's own and not told.
    _HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*")
    _MAX_HEAD = 256  # characters: a longer one is none

    def __init__(self, log: PieceLog, prefix: str, accepts: Accepts, name: str | None = None) -> None:
        self._log = log
        self._prefix = prefix
        self._accepts = accepts
        self._head = ""
        self._arguments: JsonArguments | None = None
        self._name = name

    def push(self, text: str) -> str | None:
        if self._arguments is None:
            self._head += text
            brace = self._head.find("{", 0, self._MAX_HEAD)
            if brace < 0 and self._name is None and len(self._head) < self._MAX_HEAD:
                return None
            name = self._name_before(max(brace, 0))
            if name is None:
                self._log.content(self._prefix)
                return self._head
            self._log.begin_call(name)
            self._arguments = JsonArguments(self._log)
            self._head, text = self._head[:brace], self._head[brace:]
        rest = self._arguments.push(text)
        if rest is not None and not self._arguments.is_whole:
            self._log.break_call(self._prefix + self._head + self._arguments.text)
        return rest

    def _name_before(self, brace: int) -> str | None:
        if self._name is not None:
            return self._name if self._head.startswith("{") else None
        head = self._HEAD.fullmatch(self._head, 0, brace)
        return head.group(1) if head and self._accepts(head.group(1)) else None

    def close(self) -> str:
        if self._arguments is None:
            self._log.content(self._prefix)
            return self._head
        self._log.break_call(self._prefix + self._head + self._arguments.text)
        return ""


class MistralCalls:
    """Behind ``[TOOL_CALLS]``: a list of calls, or since tokenizer v11 one call as a name and its arguments."""

    def __init__(self, log: PieceLog, prefix: str, accepts: Accepts) -> None:
        self._log = log
        self._prefix = prefix
        self._accepts = accepts
        self._body: CallBody | None = None

    def push(self, text: str) -> str | None:
        if self._body is None:
            if not text.strip():
                self._prefix += text
                return None
            if text.lstrip().startswith("["):
                self._body = CallList(
                    self._log, self._prefix, self._accepts, opening="[", separator=",", closing="]", is_certain=True
                )  # fmt: skip
            else:
                self._body = NamedCall(self._log, self._prefix, self._accepts)
        return self._body.push(text)

    def close(self) -> str:
        if self._body is None:
            self._log.content(self._prefix)
            return ""
        return self._body.close()
