"""QueueDeadlines: which requests have waited for their turn for too long.

The longest wait is one for all, so that those who came first are over first: O(1) a request, amortised, and nothing where
there is no longest wait.

Boundary: times and ids. The engine ends what is over; what has begun to run, and was put back, is never ended for waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from engine.request import Request, Sequence, SequenceStatus


class QueueDeadlines:
    """`max_queue_seconds`: None: forever."""

    def __init__(self, max_queue_seconds: float | None) -> None:
        self._max_wait_ns = None if max_queue_seconds is None else int(max_queue_seconds * 1e9)
        self._oldest: deque[tuple[int, str]] = deque()  # (arrival, request id); many have begun since

    def add(self, request: Request) -> None:
        """A request waits from its arrival on."""
        if self._max_wait_ns is not None:
            self._oldest.append((request.arrival_ns, request.request_id))

    def take_overdue(self, now_ns: int, get: Callable[[str], Sequence | None]) -> list[Sequence]:
        """Those that have waited too long, and have not begun. `get`: the live sequence of a request."""
        overdue: list[Sequence] = []
        while self._oldest and self._max_wait_ns is not None:
            arrival_ns, request_id = self._oldest[0]
            seq = get(request_id)
            # The id may be another request's by now.
            waits = seq is not None and seq.request.arrival_ns == arrival_ns and not _has_begun(seq)
            if waits and now_ns - arrival_ns < self._max_wait_ns:
                break
            self._oldest.popleft()
            if waits:
                assert seq is not None
                overdue.append(seq)
        return overdue


def _has_begun(seq: Sequence) -> bool:
    return seq.status is not SequenceStatus.WAITING or seq.epoch > 0
