"""The reasoning that a model writes before its answer, between two markers; templates may have written the first one.

Reasoning is what stands at the beginning of an output: a marker further on is content. White space around the markers belongs
to neither side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workbench.chat_output.bodies import held_back
from workbench.chat_output.pieces import PieceLog


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    start: str
    end: str


THINK = ReasoningMarkers("<think>", "</think>")  # DeepSeek-R1, Qwen3 and most others
MISTRAL = ReasoningMarkers("[THINK]", "[/THINK]")  # Magistral


class ReasoningSplitter:
    """Tells reasoning, and hands the rest on to `content`. `is_open`: the prompt ends with the start marker."""

    def __init__(
        self, log: PieceLog, markers: ReasoningMarkers, content: Callable[[str], None], *, is_open: bool
    ) -> None:
        self._log = log
        self._markers = markers
        self._content = content
        self._is_open = is_open
        self._pending = ""
        self._push: Callable[[str], None] = self._at_start

    def push(self, text: str) -> None:
        self._push(text)

    def _at_start(self, text: str) -> None:
        self._pending += text
        stripped, start = self._pending.lstrip(), self._markers.start
        if start.startswith(stripped) and stripped != start:
            return
        whole, self._pending = self._pending, ""
        if stripped.startswith(start):  # some models repeat what their template wrote
            self._go_on(self._before_reasoning, stripped[len(start) :])
        elif self._is_open:
            self._go_on(self._before_reasoning, stripped)
        else:
            self._go_on(self._content, whole)

    def _before_reasoning(self, text: str) -> None:
        if text := text.lstrip():
            self._go_on(self._in_reasoning, text)

    def _in_reasoning(self, text: str) -> None:
        self._pending += text
        before, found, after = self._pending.partition(self._markers.end)
        certain = before[: len(before) - (0 if found else held_back(before, self._markers.end))]
        told = certain.rstrip()
        self._log.reasoning(told)
        if found:
            self._pending = ""
            self._go_on(self._before_content, after)
        else:
            self._pending = self._pending[len(told) :]

    def _before_content(self, text: str) -> None:
        if text := text.lstrip():
            self._go_on(self._content, text)

    def _go_on(self, push: Callable[[str], None], text: str) -> None:
        self._push = push
        if text:
            push(text)

    def close(self) -> None:
        """The output ended: what waited is what it was taken for so far."""
        if self._push == self._in_reasoning:
            self._log.reasoning(self._pending.rstrip())
        elif self._push == self._at_start and self._is_open:
            self._log.reasoning(self._pending.strip())
        elif self._pending:
            self._content(self._pending)
        self._pending = ""


class ReasoningTokens:
    """Counts an output's reasoning tokens by the markers' ids, without the markers. `is_open`: see ReasoningSplitter."""

    def __init__(self, start_id: int, end_id: int, *, is_open: bool) -> None:
        self._start_id = start_id
        self._end_id = end_id
        self._is_inside = is_open
        self._is_over = False
        self.count = 0

    def push(self, token_ids: Sequence[int]) -> None:
        if self._is_over:
            return
        for token_id in token_ids:
            if token_id == self._end_id and self._is_inside:
                self._is_over = True
                return
            if token_id == self._start_id:
                self._is_inside = True
            elif self._is_inside:
                self.count += 1
