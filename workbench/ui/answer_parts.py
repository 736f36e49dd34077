"""What an output consists of: reasoning, content and tool calls, told apart as the text comes.

Reasoning is what stands between ``<think>`` and ``</think>`` at the beginning of an output, or before ``</think>`` where the
chat template has opened the tag in the prompt.

Boundary: text in, pieces out. Which calls a model can make is ``workbench.api.tool_calls``'s to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from workbench.api.tool_calls import ParsedToolCall, ToolCallParser, find_markers
from workbench.errors import UnsupportedFieldError

if TYPE_CHECKING:
    from engine.tokenizer import TokenizerLike

OPEN, CLOSE = "<think>", "</think>"
_TAIL_TOKENS = 16  # of a prompt, more than an opened tag and the white space behind it


@dataclass(frozen=True, slots=True)
class Piece:
    """What some text added to an answer."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ParsedToolCall, ...] = ()


class _Phase(Enum):
    START = auto()  # nothing yet but white space or the beginning of a tag
    REASONING = auto()
    CLOSED = auto()  # behind the closing tag, before any content
    CONTENT = auto()


class OutputParser:
    """Splits one growing output; holds back what may be the beginning of a tag or marker."""

    def __init__(self, calls: ToolCallParser | None = None, *, starts_in_reasoning: bool = False) -> None:
        self._calls = calls
        self._phase = _Phase.REASONING if starts_in_reasoning else _Phase.START
        self._pending = ""

    def push(self, text: str) -> Piece:
        """What `text` brought."""
        reasoning, rest = self._split(text)
        if self._calls is None:
            return Piece(reasoning, rest)
        content, calls = self._calls.push(rest)
        return Piece(reasoning, content, tuple(calls))

    def flush(self) -> Piece:
        """The rest at the end of the output."""
        rest, self._pending = self._pending, ""
        if self._phase is _Phase.REASONING:
            return Piece(reasoning=rest)
        return Piece(content=rest + (self._calls.flush() if self._calls else ""))

    def _split(self, text: str) -> tuple[str, str]:
        """What is reasoning, and what comes behind it."""
        text = self._pending + text
        self._pending = ""
        if self._phase is _Phase.START:
            begun = text.lstrip()
            if begun.startswith(OPEN):
                self._phase, text = _Phase.REASONING, begun[len(OPEN) :]
            elif OPEN.startswith(begun):
                self._pending, text = text, ""
            else:
                self._phase = _Phase.CONTENT
        reasoning = ""
        if self._phase is _Phase.REASONING:
            reasoning, found, behind = text.partition(CLOSE)
            if not found:
                return self._hold_back(text), ""
            self._phase, text = _Phase.CLOSED, behind
        if self._phase is _Phase.CLOSED:
            text = text.lstrip("\n")
            self._phase = _Phase.CONTENT if text else _Phase.CLOSED
        return reasoning, text

    def _hold_back(self, text: str) -> str:
        """`text` without an end that may be the beginning of the closing tag."""
        ends = (n for n in range(min(len(CLOSE) - 1, len(text)), 0, -1) if CLOSE.startswith(text[-n:]))
        keep = next(ends, 0)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]


def output_parser(tokenizer: TokenizerLike, prompt_ids: Sequence[int], *, has_tools: bool) -> OutputParser:
    """The parser of one answer.

    Raises:
        UnsupportedFieldError: tools for a model that has no way to call one.
    """
    markers = find_markers(tokenizer) if has_tools else None
    if has_tools and markers is None:
        raise UnsupportedFieldError(
            "this model's tokenizer has no tool-call tokens", param="tools",
            remedy="Leave tools out, or choose a model that was trained to call tools.",
        )  # fmt: skip
    tail = tokenizer.decode(list(prompt_ids[-_TAIL_TOKENS:]), skip_special_tokens=False)
    return OutputParser(
        ToolCallParser(markers) if markers else None, starts_in_reasoning=tail.rstrip().endswith(OPEN)
    )
