"""What a model's output says: reasoning, content and tool calls, told apart as its text comes.

Reasoning is what stands between ``<think>`` and ``</think>`` at the beginning of an output, or before ``</think>`` where the
chat template has opened the tag in the prompt. White space around the tags belongs to neither side.

Boundary: text in, pieces out. Which calls a model can make is ``workbench.api.tool_calls``'s to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from workbench.api.tool_calls import ParsedToolCall, ToolCallMarkers, ToolCallParser, find_markers

if TYPE_CHECKING:
    from engine.tokenizer import TokenizerLike

OPEN, CLOSE = "<think>", "</think>"
_PROMPT_END = 16  # tokens that are enough to see whether a prompt ends with the tag


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


Piece = Content | Reasoning | ParsedToolCall


@dataclass(slots=True)
class ParsedOutput:
    """An output so far."""

    content: str = ""
    reasoning: str = ""
    calls: list[ParsedToolCall] = field(default_factory=list)


def gather(pieces: Iterable[Piece]) -> ParsedOutput:
    """All pieces of one output together."""
    found = ParsedOutput()
    for piece in pieces:
        match piece:
            case Content(text):
                found.content += text
            case Reasoning(text):
                found.reasoning += text
            case ParsedToolCall():
                found.calls.append(piece)
    return found


@dataclass(frozen=True, slots=True)
class OutputSyntax:
    """What to look for in an output; each output gets a parser of its own."""

    calls: ToolCallMarkers | None = None
    is_open: bool = False  # the prompt ends within reasoning

    @property
    def shows_special_tokens(self) -> bool:
        """Markers may be special tokens: they must be decoded to be found."""
        return self.calls is not None

    def parser(self) -> OutputParser:
        """A new output's parser."""
        return OutputParser(ToolCallParser(self.calls) if self.calls else None, is_open=self.is_open)


def output_syntax(
    tokenizer: TokenizerLike, prompt_token_ids: Sequence[int] = (), tools: Sequence[Mapping[str, Any]] = ()
) -> OutputSyntax:
    """What to look for in the answer to a prompt; without tools, calls are not looked for."""
    end = tokenizer.decode(list(prompt_token_ids[-_PROMPT_END:]), skip_special_tokens=False)
    return OutputSyntax(find_markers(tokenizer) if tools else None, end.rstrip().endswith(OPEN))


class _Phase(Enum):
    START = auto()  # nothing yet but white space or the beginning of a tag
    OPENED = auto()  # behind the opening tag
    REASONING = auto()
    CLOSED = auto()  # behind the closing tag
    CONTENT = auto()


class OutputParser:
    """Splits one growing output. Whatever the pieces that its text comes in, it finds the same."""

    def __init__(self, calls: ToolCallParser | None = None, *, is_open: bool = False) -> None:
        self._calls = calls
        self._phase = _Phase.OPENED if is_open else _Phase.START
        self._pending = ""

    def push(self, text: str) -> list[Piece]:
        """What `text` made certain."""
        reasoning, rest = self._split(self._pending + text)
        content, calls = self._calls.push(rest) if self._calls is not None else (rest, [])
        return _pieces(reasoning, content, calls)

    def finish(self) -> list[Piece]:
        """The rest, at the end of the output."""
        rest, self._pending = self._pending, ""
        if self._phase is _Phase.REASONING:
            return _pieces(rest.rstrip(), "", [])
        return _pieces("", rest + (self._calls.flush() if self._calls is not None else ""), [])

    def _split(self, text: str) -> tuple[str, str]:
        """What is reasoning, and what comes behind it; the rest is held back."""
        self._pending, reasoning = "", ""
        if self._phase is _Phase.START:
            begun = text.lstrip()
            if not begun.startswith(OPEN) and OPEN.startswith(begun):
                self._pending = text
                return "", ""
            is_tag = begun.startswith(OPEN)
            self._phase = _Phase.OPENED if is_tag else _Phase.CONTENT
            text = begun[len(OPEN) :] if is_tag else text
        if self._phase is _Phase.OPENED:
            text = text.lstrip()
            self._phase = _Phase.REASONING if text else _Phase.OPENED
        if self._phase is _Phase.REASONING:
            before, found, text = text.partition(CLOSE)
            reasoning = (before if found else before[: len(before) - _held_back(before)]).rstrip()
            if not found:
                self._pending = before[len(reasoning) :]
                return reasoning, ""
            self._phase = _Phase.CLOSED
        if self._phase is _Phase.CLOSED:
            text = text.lstrip()
            self._phase = _Phase.CONTENT if text else _Phase.CLOSED
        return reasoning, text if self._phase is _Phase.CONTENT else ""


def _pieces(reasoning: str, content: str, calls: Sequence[ParsedToolCall]) -> list[Piece]:
    told: list[Piece] = [Reasoning(reasoning)] if reasoning else []
    if content:
        told.append(Content(content))
    return [*told, *calls]


def _held_back(text: str) -> int:
    """Length of the longest end of `text` that begins the closing tag."""
    longest = min(len(CLOSE) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if CLOSE.startswith(text[-n:])), 0)
