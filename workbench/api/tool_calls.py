"""Tool calls in a model's text: found by the model's own markers, incrementally, so that a stream can carry them.

Text before and between calls is content. A call whose JSON cannot be read, or that never ends, is given back as content
with its markers: the caller sees what the model wrote.

Boundary: text in, pieces out. Which markers a model uses is read from its tokenizer.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ToolCallMarkers:
    start: str
    end: str


KNOWN_MARKERS = (
    ToolCallMarkers("<|tool_call|>", "<|/tool_call|>"),  # the bundled model
    ToolCallMarkers("<tool_call>", "</tool_call>"),  # Hermes, Qwen
)


@dataclass(frozen=True, slots=True)
class ParsedToolCall:
    id: str
    name: str
    arguments: str  # JSON text, as OpenAI has it


class _Encodes(Protocol):
    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...


def find_markers(tokenizer: _Encodes) -> ToolCallMarkers | None:
    """The markers that are single tokens of this tokenizer; None when the model has no way to call a tool."""
    for markers in KNOWN_MARKERS:
        pieces = (tokenizer.encode(text, add_special_tokens=False) for text in (markers.start, markers.end))
        if all(len(ids) == 1 for ids in pieces):
            return markers
    return None


class ToolCallParser:
    """Splits a growing text into content and calls; holds back what may be the beginning of a marker."""

    def __init__(self, markers: ToolCallMarkers) -> None:
        self._markers = markers
        self._pending = ""
        self._in_call = False

    def push(self, text: str) -> tuple[str, list[ParsedToolCall]]:
        """Content and complete calls that `text` brought."""
        self._pending += text
        content: list[str] = []
        calls: list[ParsedToolCall] = []
        while self._advance(content, calls):
            pass
        return "".join(content), calls

    def flush(self) -> str:
        """The rest at the end of the output, as content."""
        rest = (self._markers.start if self._in_call else "") + self._pending
        self._pending, self._in_call = "", False
        return rest

    def _advance(self, content: list[str], calls: list[ParsedToolCall]) -> bool:
        marker = self._markers.end if self._in_call else self._markers.start
        before, found, after = self._pending.partition(marker)
        if not found:
            if not self._in_call:
                keep = _held_back(self._pending, marker)
                content.append(self._pending[: len(self._pending) - keep])
                self._pending = self._pending[len(self._pending) - keep :]
            return False
        self._pending = after
        if self._in_call:
            call = _parse(before)
            if call is None:
                content.append(f"{self._markers.start}{before}{self._markers.end}")
            else:
                calls.append(call)
        else:
            content.append(before)
        self._in_call = not self._in_call
        return True


def _held_back(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if marker.startswith(text[-n:])), 0)


def _parse(body: str) -> ParsedToolCall | None:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return None
    arguments = data.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
    return ParsedToolCall(f"call_{uuid.uuid4().hex[:24]}", data["name"], arguments)
