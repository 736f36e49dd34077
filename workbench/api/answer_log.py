"""What one API answer tells the request log: who asked, its texts, and that the answer waits until its rows are written.

A client that has the end of its answer can rely on the request being in the log, even if the process is killed then.

Boundary: between `generation` and ``workbench.observe.request_log``; without a log it does nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from workbench.observe import request_context

if TYPE_CHECKING:
    from engine.records import Completion
    from workbench.observe.request_log import RequestLog
    from workbench.observe.ticket import Ticket

log = logging.getLogger(__name__)
MAX_WAIT_S = 2.0  # a disk that hangs delays an answer by so much, not for ever


class AnswerLog:
    """The log's view of one answer. `prompt`: what was asked, as text."""

    def __init__(self, request_log: RequestLog | None, prompt: str = "") -> None:
        self._log = request_log
        self._prompt = prompt
        self._tickets: list[Ticket] = []

    @property
    def wants_text(self) -> bool:
        """Whether texts are kept at all."""
        return self._log is not None and self._log.text != "off"

    @contextmanager
    def expected(self, request_ids: Sequence[str]) -> Iterator[None]:
        """Around the submission of engine requests, which takes all or none: what it raises means that none will be logged."""
        if self._log is None:
            yield
            return
        origin = request_context.current().origin()
        self._tickets += [self._log.expect(request_id, origin) for request_id in request_ids]
        try:
            yield
        except BaseException:
            for request_id in request_ids:
                self._log.forget(request_id, origin)
            self._tickets.clear()
            raise

    def ended(self, completions: Iterable[Completion]) -> None:
        """After they ended: hand their texts over."""
        if self._log is not None and self.wants_text:
            for completion in completions:
                self._log.add_text(completion.request_id, self._prompt, completion.text)

    async def written(self) -> None:
        """Wait until the rows outlast this process."""
        if not self._tickets:
            return
        done = await asyncio.gather(*(ticket.written(MAX_WAIT_S) for ticket in self._tickets))
        if not all(done):
            log.warning("a request was answered before it was on the request log")
