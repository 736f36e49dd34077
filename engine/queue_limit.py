"""QueueLimit: how much may wait in one engine, and when it is worth while to come again.

It holds against what waits for a row at this moment, requests and tokens; what comes together is taken whole or refused whole.
To an empty queue everything may come: what can run at all must not be refused for ever.

How long until there is room is told by how fast requests and tokens left the queue in the last seconds. Submitting threads
call under one lock, the engine thread adds samples beside them.

Boundary: counts and times. Who counts what waits is the worker.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.errors import QueueFullError

AUTO_ROWS = 8  # requests that may wait, for each that can run at once
AUTO_CACHES = 8  # tokens that may wait, in times of what the KV cache holds
_SAMPLE_NS = 500_000_000
_NUM_SAMPLES = 60  # half a minute of them
_MAX_RETRY_S = 60
_UNKNOWN_RETRY_S = 5  # nothing has left the queue yet


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits, or came, or left."""

    num_requests: int
    num_tokens: int

    def __add__(self, other: Backlog) -> Backlog:
        return Backlog(self.num_requests + other.num_requests, self.num_tokens + other.num_tokens)

    def __sub__(self, other: Backlog) -> Backlog:
        return Backlog(self.num_requests - other.num_requests, self.num_tokens - other.num_tokens)


class QueueLimit:
    """`max_requests`, `max_tokens`: None: as many as come."""

    def __init__(self, max_requests: int | None, max_tokens: int | None) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_refused = 0  # requests
        self._num_entered = Backlog(0, 0)  # since the beginning
        self._samples: deque[tuple[int, Backlog]] = deque(
            maxlen=_NUM_SAMPLES
        )  # (when, left since the beginning)

    @classmethod
    def of(cls, config: EngineConfig, num_slots: int) -> QueueLimit:
        """The limit that a config asks for. `num_slots`: tokens that the KV cache holds."""
        requests, tokens = config.max_queued_requests, config.max_queued_tokens
        return cls(
            AUTO_ROWS * config.max_num_seqs if isinstance(requests, str) else requests,
            AUTO_CACHES * num_slots if isinstance(tokens, str) else tokens,
        )

    def enter(self, coming: Backlog, waiting: Backlog, now_ns: int) -> None:
        """Count what comes, while `waiting` waits.

        Raises:
            QueueFullError: it was not counted; naming what waits, the limit, and when to come again.
        """
        total = waiting + coming
        over = Backlog(
            _excess(total.num_requests, self.max_requests), _excess(total.num_tokens, self.max_tokens)
        )
        if waiting.num_requests and (over.num_requests or over.num_tokens):
            self.num_refused += coming.num_requests
            value, limit, unit = total.num_requests, self.max_requests, "requests"
            if over.num_tokens:
                value, limit, unit = total.num_tokens, self.max_tokens, "tokens"
            retry_after_s = self._retry_after_s(over, waiting, now_ns)
            raise QueueFullError(
                f"the queue is full: {value} {unit} would wait, at most {limit} may", value=value, limit=limit,
                remedy=f"Send it again in about {retry_after_s} s.", retry_after_s=retry_after_s,
            )  # fmt: skip
        self._num_entered += coming

    def sample(self, waiting: Backlog, now_ns: int) -> None:
        """Take note of what has left the queue by now. On the engine thread."""
        if not self._samples or now_ns - self._samples[-1][0] >= _SAMPLE_NS:
            self._samples.append((now_ns, self._num_entered - waiting))

    def forget_samples(self) -> None:
        """The engine idles: how fast the queue moved says nothing of the next one."""
        self._samples.clear()

    def _retry_after_s(self, over: Backlog, waiting: Backlog, now_ns: int) -> int:
        """Whole seconds until `over` has left, as fast as requests and tokens left lately; from 1 to 60."""
        samples = list(self._samples)  # the engine thread adds to it
        if not samples:
            return _UNKNOWN_RETRY_S
        since_ns, left_then = samples[0]
        left = self._num_entered - waiting - left_then
        elapsed_s = (now_ns - since_ns) / 1e9
        pairs = ((over.num_requests, left.num_requests), (over.num_tokens, left.num_tokens))
        waits_s = [
            amount * elapsed_s / gone if gone > 0 else _MAX_RETRY_S for amount, gone in pairs if amount
        ]
        return max(1, math.ceil(min(_MAX_RETRY_S, max(waits_s))))


def _excess(amount: int, limit: int | None) -> int:
    return 0 if limit is None else max(0, amount - limit)
