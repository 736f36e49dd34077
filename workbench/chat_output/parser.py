"""OutputParser: an output's text in, its pieces out: reasoning, content and tool calls, as soon as each is certain.

Boundary: text. Which markers a model uses, and what a request allows, is decided in `syntax`.
"""

from __future__ import annotations

from collections.abc import Callable

from workbench.chat_output.bodies import CallBody, held_back
from workbench.chat_output.pieces import Piece, PieceLog
from workbench.chat_output.reasoning import ReasoningMarkers, ReasoningSplitter

MakeBody = Callable[[str], CallBody]  # gets the text that the body gives back before itself


class CallParser:
    """Finds calls in content: behind `marker`, and where the content begins with the character `bare`.

    White space before a call, and behind the last one, belongs to nobody; what may be the beginning of a marker is held back.
    """

    def __init__(
        self, log: PieceLog, *, marker: str = "", body: MakeBody | None = None,
        bare: str = "", bare_body: MakeBody | None = None,
    ) -> None:  # fmt: skip
        self._log = log
        self._marker = marker
        self._make_body = body
        self._bare = bare
        self._make_bare_body = bare_body
        self._pending = ""
        self._body: CallBody | None = None
        self._is_fresh = bool(bare)  # only white space was there

    def push(self, text: str) -> None:
        self._pending += text
        while self._pending and self._step():
            pass

    def close(self) -> None:
        """The output ended."""
        while self._body is not None:
            body, self._body = self._body, None
            self.push(body.close())
        if self._pending.strip() or not self._log.num_calls:
            self._log.content(self._pending)
        self._pending = ""

    def _step(self) -> bool:
        """Advance by one change of state; False: more text is needed."""
        if self._body is not None:
            rest, self._pending = self._body.push(self._pending), ""
            if rest is None:
                return False
            self._body, self._pending = None, rest
            return True
        if self._is_fresh:
            return self._first_step()
        at = self._pending.find(self._marker) if self._marker else -1
        if at >= 0:
            assert self._make_body is not None
            told = self._tell(self._pending[:at])
            end = at + len(self._marker)
            self._body = self._make_body(self._pending[told:end])
            self._pending = self._pending[end:]
            return True
        told = self._tell(self._pending[: len(self._pending) - held_back(self._pending, self._marker)])
        self._pending = self._pending[told:]
        return False

    def _first_step(self) -> bool:
        stripped = self._pending.lstrip()
        if not stripped:
            return False
        self._is_fresh = False
        if stripped.startswith(self._bare):
            assert self._make_bare_body is not None
            self._body = self._make_bare_body(self._pending[: len(self._pending) - len(stripped)])
            self._pending = stripped
        return True

    def _tell(self, text: str) -> int:
        """Tell `text` as content, but for the white space at its end; how many characters that was."""
        certain = text.rstrip()
        self._log.content(certain)
        return len(certain)


class OutputParser:
    """One output's parser. Whatever the pieces that its text comes in, it finds the same."""

    def __init__(
        self, log: PieceLog, calls: CallParser | None, reasoning: ReasoningMarkers | None, *, is_open: bool
    ) -> None:
        self._log = log
        self._calls = calls
        content = calls.push if calls is not None else log.content
        self._splitter = ReasoningSplitter(log, reasoning, content, is_open=is_open) if reasoning else None
        self._push = self._splitter.push if self._splitter is not None else content

    @property
    def num_calls(self) -> int:
        """Whole calls so far."""
        return self._log.num_calls

    def push(self, text: str) -> list[Piece]:
        """What `text` made certain."""
        if text:
            self._push(text)
        return self._log.take()

    def finish(self) -> list[Piece]:
        """The rest, at the end of the output."""
        if self._splitter is not None:
            self._splitter.close()
        if self._calls is not None:
            self._calls.close()
        return self._log.take()
