"""Pieces: what a chat model's output is split into, in order, as soon as each is certain.

Boundary: types, and how a list of pieces becomes one answer. What the pieces are cut from is the parsers'.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, field

_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int  # calls of one output are counted from 0
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A fragment of a call's arguments; all of a call's fragments together are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallBroken:
    """A call that was told of and is none after all: its arguments end too early, or are no JSON."""

    index: int
    text: str  # all of it as the model wrote it, with its markers


Piece = Content | Reasoning | CallStart | CallArguments | CallBroken


@dataclass(slots=True)
class ToolCall:
    """A call that is whole."""

    id: str
    name: str
    arguments: str = ""  # JSON text, as OpenAI has it


@dataclass(slots=True)
class ParsedOutput:
    """A whole output."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def gather(pieces: Iterable[Piece]) -> ParsedOutput:
    """All pieces of one output together. A broken call is given back as content, in its place."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, ToolCall] = {}
    for piece in pieces:
        match piece:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallStart(index, call_id, name):
                calls[index] = ToolCall(call_id, name)
            case CallArguments(index, text):
                calls[index].arguments += text
            case CallBroken(index, text):
                del calls[index]
                content.append(text)
    return ParsedOutput("".join(content), "".join(reasoning), list(calls.values()))


class PieceLog:
    """Where parsers put what they found: counts calls, names them, joins neighbours of one kind.

    `max_calls`: what follows the last of so many calls is dropped; None: nothing is. `short_ids`: 9 letters and digits, the
    only form that Mistral's templates take.
    """

    def __init__(self, max_calls: int | None = None, *, short_ids: bool = False) -> None:
        self._pieces: list[Piece] = []
        self._max_calls = max_calls
        self._short_ids = short_ids
        self._num_begun = 0
        self.num_calls = 0  # whole ones

    def take(self) -> list[Piece]:
        """What came since the last time."""
        taken, self._pieces = self._pieces, []
        return taken

    def content(self, text: str) -> None:
        if text and not self._is_full:
            if self._pieces and isinstance(last := self._pieces[-1], Content):
                self._pieces[-1] = Content(last.text + text)
            else:
                self._pieces.append(Content(text))

    def reasoning(self, text: str) -> None:
        if text:
            self._pieces.append(Reasoning(text))

    def begin_call(self, name: str) -> None:
        if not self._is_full:
            self._pieces.append(CallStart(self._num_begun, self._new_id(), name))
        self._num_begun += 1

    def arguments(self, text: str) -> None:
        """A fragment for the call that began last."""
        index = self._num_begun - 1
        if not text or self._is_full:
            return
        if self._pieces and isinstance(last := self._pieces[-1], CallArguments):
            self._pieces[-1] = CallArguments(index, last.text + text)
        else:
            self._pieces.append(CallArguments(index, text))

    def end_call(self) -> None:
        """The call that began last is whole."""
        if not self._is_full:
            self.num_calls += 1

    def break_call(self, text: str) -> None:
        """The call that began last is none; `text`: as the model wrote it."""
        if not self._is_full:
            self._pieces.append(CallBroken(self._num_begun - 1, text))

    @property
    def _is_full(self) -> bool:
        return self.num_calls == self._max_calls

    def _new_id(self) -> str:
        if self._short_ids:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"
