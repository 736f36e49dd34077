"""Trying again: what has certainly not been done yet is sent again, later, as often as the server's own word allows.

Safe to repeat are requests that never reached a server (no connection) and those that it refused before any work: too many
requests (429) and unavailable (503). What broke off after it was sent may have been answered and paid for, so it is not sent
twice. The pause doubles, with jitter so that many clients do not come back together; ``Retry-After`` wins where it is longer.

Sources: RFC 9110, section 10.2.3 (Retry-After); "Exponential Backoff And Jitter", AWS Architecture Blog, 2015 (full jitter).
"""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import httpx

T = TypeVar("T")
REFUSED = (429, 503)
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class RefusedForNow(Exception):
    """A server's 429 or 503, with what is to be raised when it stays so."""

    def __init__(self, error: Exception, retry_after_s: float | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and for how long. `sleep` is replaced by tests."""

    attempts: int = 3
    first_pause_s: float = 0.5
    max_pause_s: float = 20.0  # a server that asks for more is not waited for
    sleep: Callable[[float], None] = time.sleep

    def run(self, send: Callable[[], T]) -> T:
        """`send` until it neither fails to connect nor raises RefusedForNow, or attempts or patience end.

        Raises what the last one raised, of RefusedForNow its error.
        """
        for attempt in range(1, self.attempts + 1):
            asked: float | None = None
            try:
                return send()
            except _NEVER_SENT:
                if attempt == self.attempts:
                    raise
            except RefusedForNow as refused:
                asked = refused.retry_after_s
                if attempt == self.attempts or (asked or 0.0) > self.max_pause_s:
                    raise refused.error from None
            longest = min(self.max_pause_s, self.first_pause_s * 2 ** (attempt - 1))
            self.sleep(max(asked or 0.0, random.uniform(0, longest)))
        raise AssertionError("at least one attempt is made")


def retry_after_s(headers: httpx.Headers) -> float | None:
    """What the header asks for: seconds, or until a date; None where it asks for nothing readable."""
    text = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
