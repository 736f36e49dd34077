"""Readings: what slow services said last, fetched off the script thread, so that a page never waits for them.

A call to MLflow takes 10 to 100 ms and may take seconds while its server starts. `Readings.get` gives the last value at
once with its age, starts a fetch when the value is older than `ttl_s`, and waits (at most `wait_s`) only for a first value or
for one that was told to be out of date. What a fetch raises is kept as the reading's error beside the last good value. One set for all sessions; bounded.

No Streamlit here. Reads only: what changes something is an action (``workbench.ui.actions``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

log = logging.getLogger(__name__)
T = TypeVar("T")
Key = tuple[Hashable, ...]  # its first part is the subject that `forget` names
MAX_READINGS = 256
FIRST_WAIT_S = 0.25
FAILED_TTL_S = 3.0  # of a first fetch that failed, where the value would say how long it lasts


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """What is known now. `value` is None until a first fetch succeeded; `error` is the last fetch's, None if it succeeded."""

    value: T | None = None
    age_s: float | None = None
    error: Exception | None = None
    pending: bool = False  # a fetch is under way


@dataclass(slots=True)
class _Entry:
    value: Any = None
    read_at: float | None = None  # monotonic; when the value was fetched
    tried_at: float | None = None  # when the last fetch ended, well or not
    error: Exception | None = None
    fetching: bool = False
    stale: bool = False  # told to be out of date: the next reader waits for a new one

    def is_younger(self, ttl_s: float | Callable[[Any], float]) -> bool:
        if self.tried_at is None:
            return False
        if callable(ttl_s):
            ttl_s = FAILED_TTL_S if self.value is None else ttl_s(self.value)
        return time.monotonic() - self.tried_at < ttl_s


class Readings:
    """Thread-safe."""

    def __init__(self, limit: int = MAX_READINGS) -> None:
        self._limit = limit
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._changed = threading.Condition()

    def get(
        self,
        key: Key,
        read: Callable[[], T],
        *,
        ttl_s: float | Callable[[T], float] = 3.0,
        wait_s: float = FIRST_WAIT_S,
    ) -> Reading[T]:
        """The last value of `key`, read anew in the background when it is old; how long one lasts may depend on it."""
        with self._changed:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            self._drop_oldest()
            fresh = not entry.stale and entry.is_younger(ttl_s)
            is_needed = entry.value is None or entry.stale
            if not fresh and not entry.fetching:
                entry.fetching, entry.stale = True, False
                threading.Thread(
                    target=self._read, args=(key, entry, read), name="quire-reading", daemon=True
                ).start()
            if entry.fetching and is_needed:
                self._changed.wait_for(lambda: not entry.fetching, wait_s)
            age = None if entry.read_at is None else time.monotonic() - entry.read_at
            return Reading(cast("T | None", entry.value), age, entry.error, entry.fetching)

    def read(self, name: str, read: Callable[[], T], max_age_s: float) -> T:
        """The value as read within `max_age_s`, by whomever; else read here and now. For what costs little, often."""
        with self._changed:
            entry = self._entries.setdefault((name,), _Entry())
            self._entries.move_to_end((name,))
            self._drop_oldest()
            if entry.read_at is not None and time.monotonic() - entry.read_at < max_age_s:
                return cast("T", entry.value)
        value = read()
        with self._changed:
            entry.value, entry.read_at = value, time.monotonic()
        return value

    def forget(self, *subjects: Hashable) -> None:
        """What was read about these subjects is out of date; the last values stay until the new ones are there."""
        with self._changed:
            for key, entry in self._entries.items():
                if key[0] in subjects:
                    entry.stale = True

    def _read(self, key: Key, entry: _Entry, read: Callable[[], Any]) -> None:
        value, error = None, None
        try:
            value = read()
        except Exception as raised:  # noqa: BLE001 - the thread's boundary: the page shows it
            error = raised
            log.info("reading %s failed: %s", key[0], raised)
        with self._changed:
            entry.tried_at = time.monotonic()
            entry.error, entry.fetching = error, False
            if error is None:
                entry.value, entry.read_at = value, entry.tried_at
            self._changed.notify_all()

    def _drop_oldest(self) -> None:
        while len(self._entries) > self._limit:
            self._entries.popitem(last=False)
