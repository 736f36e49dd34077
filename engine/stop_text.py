"""StopTextMatcher: finds stop texts in a growing output and holds back what may be the beginning of one.

Boundary: text of one request. Detokenizing is the tokenizer's, ending the request the engine's.
"""

from __future__ import annotations


class StopTextMatcher:
    """Feeds on pieces of text; gives out what is certainly not part of a stop text."""

    __slots__ = ("_held", "_include", "_stops", "matched")

    def __init__(self, stops: tuple[str, ...], *, include_in_output: bool = False) -> None:
        assert all(stops), "stop texts must not be empty"
        self._stops = stops
        self._include = include_in_output
        self._held = ""
        self.matched: str | None = None  # the stop text that ended the output

    def push(self, text: str) -> str:
        """Text that may be shown now. Sets `matched` when a stop text is complete.

        The one that is complete first wins, of several the longest: so it does not matter how the text was cut into tokens.
        """
        assert self.matched is None, "the output has ended"
        buffer = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return buffer[: at + len(self.matched)] if self._include else buffer[:at]
        keep = max(_overlap(buffer, stop) for stop in self._stops)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def pass_over(self, text: str) -> str:
        """Text that no stop may end yet (below min_tokens): shown at once and never part of a match."""
        shown = self._held + text
        self._held = ""
        return shown

    def flush(self) -> str:
        """What is still held back, when the output ends otherwise."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
