"""QueueDeadlines: which requests have waited for their turn for too long, and whose own deadline is over.

The longest wait is one for all, so that those who came first are over first: O(1) a request, amortised, and nothing where
there is no longest wait. Deadlines of requests' own stand in a heap: O(log n) for such a request, O(1) for a step in which none is
over, and nothing where no request has one.

Boundary: times and ids. The engine ends what is over; what has begun to run, and was put back, is never ended for waiting, but by
its own deadline, as everything is.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.request import Request

_MIN_TIDIED = 64  # entries of requests that ended long before their deadlines, which are not worth a look


@dataclass(frozen=True, slots=True)
class Overdue:
    """A request that is to end now, and why, as its caller is told."""

    request_id: str
    why: str


class QueueDeadlines:
    """`max_queue_seconds`: None: forever. `get`: the live request of an id. `has_begun`: whether a live one has run."""

    def __init__(
        self,
        max_queue_seconds: float | None,
        *,
        get: Callable[[str], Request | None],
        has_begun: Callable[[Request], bool],
    ) -> None:
        self._max_wait_ns = None if max_queue_seconds is None else int(max_queue_seconds * 1e9)
        self._get = get
        self._has_begun = has_begun
        self._oldest: deque[tuple[int, str]] = deque()  # (arrival, request id); many have begun since
        self._deadlines: list[tuple[int, int, str]] = []  # heap of (deadline, arrival, id); many have ended
        self._tidy_at = _MIN_TIDIED

    def add(self, request: Request) -> None:
        """A request waits from its arrival on."""
        if self._max_wait_ns is not None:
            self._oldest.append((request.arrival_ns, request.request_id))
        if request.deadline_ns is not None:
            heapq.heappush(self._deadlines, (request.deadline_ns, request.arrival_ns, request.request_id))
            if len(self._deadlines) > self._tidy_at:
                self._tidy()

    def take_overdue(self, now_ns: int) -> list[Overdue]:
        """Those that have waited too long and have not begun, and those whose deadline is over."""
        overdue = {each.request_id: each for each in self._take_late(now_ns)}  # it may be both
        for each in self._take_expired(now_ns):
            overdue.setdefault(each.request_id, each)
        return list(overdue.values())

    def _take_late(self, now_ns: int) -> list[Overdue]:
        late: list[Overdue] = []
        while self._oldest and self._max_wait_ns is not None:
            arrival_ns, request_id = self._oldest[0]
            request = self._live(request_id, arrival_ns)
            waits = request is not None and not self._has_begun(request)
            if waits and now_ns - arrival_ns < self._max_wait_ns:
                break
            self._oldest.popleft()
            if waits:
                waited_s, most_s = (now_ns - arrival_ns) / 1e9, self._max_wait_ns / 1e9
                why = f"it waited {waited_s:.1f} s for its turn, at most {most_s:g} s are allowed"
                late.append(Overdue(request_id, why))
        return late

    def _take_expired(self, now_ns: int) -> list[Overdue]:
        expired: list[Overdue] = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            deadline_ns, arrival_ns, request_id = heapq.heappop(self._deadlines)
            request = self._live(request_id, arrival_ns)
            if request is not None:
                state = "ran" if self._has_begun(request) else "waited for its turn"
                given_s = (deadline_ns - arrival_ns) / 1e9
                expired.append(Overdue(request_id, f"its {given_s:g} s were over while it {state}"))
        return expired

    def _live(self, request_id: str, arrival_ns: int) -> Request | None:
        request = self._get(request_id)  # the id may be another request's by now
        return request if request is not None and request.arrival_ns == arrival_ns else None

    def _tidy(self) -> None:
        """Forget those that ended before their deadline: what is kept is at most twice what lives, O(1) a request, amortised."""
        self._deadlines = [each for each in self._deadlines if self._live(each[2], each[1]) is not None]
        heapq.heapify(self._deadlines)
        self._tidy_at = max(_MIN_TIDIED, 2 * len(self._deadlines))
