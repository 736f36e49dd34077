"""What each key may still ask for: requests and tokens a minute, requests at once, tokens a day.

Rates are token buckets that hold one minute's worth. A request's tokens are taken when it is submitted (its prompt's, and as many
of output as it may get) and settled when the engine tells of its end, whatever ended it: what it did not use is given back.
A request that asks for more than a bucket holds waits for a full one and leaves it in debt; a day's budget is never exceeded.

Days are UTC's. What was used is kept in memory and written by `workbench.access.key_ring` every ten seconds: a process that is
killed forgets the last seconds' use, at most a minute's.

Boundary: counting, for one process. Several servers on one store learn of each other's daily use when they read it, within
seconds; their rates are each their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import TYPE_CHECKING

from workbench.access.keys import ApiKey, KeyLimits
from workbench.errors import ApiError

if TYPE_CHECKING:
    from engine.records import EngineEvent, RequestRecord, StepRecord

MINUTE_S = 60.0
_BUSY_RETRY_S = 1  # when one of several running requests ends cannot be known
Clock = Callable[[], float]


class RateLimitError(ApiError):
    """The key has asked for as much as it may for now. `retry_after_s`: when to come again."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, limit: int, param: str, remedy: str, retry_after_s: float) -> None:
        super().__init__(message, limit=limit, param=param, remedy=remedy)
        self.retry_after_s = max(1, ceil(retry_after_s))


@dataclass(slots=True)
class Bucket:
    """A token bucket: `per_minute` flow in steadily, and at most as many are kept. Below 0 it is in debt."""

    per_minute: int
    level: float
    at: float

    def refill(self, now: float) -> None:
        gained = (now - self.at) * self.per_minute / MINUTE_S
        self.level, self.at = min(self.per_minute, self.level + gained), now

    def seconds_until(self, amount: float) -> float:
        """Until so much is there; 0.0 when it is. Refill it before."""
        return max(0.0, amount - self.level) * MINUTE_S / self.per_minute


@dataclass(frozen=True, slots=True)
class Cost:
    """What one engine request may take. `num_prompt_tokens` is 0 for further answers to the same prompt."""

    request_id: str
    num_prompt_tokens: int
    max_output_tokens: int

    @property
    def total(self) -> int:
        return self.num_prompt_tokens + self.max_output_tokens


@dataclass(frozen=True, slots=True)
class _Reservation:
    cost: Cost
    from_bucket: float


@dataclass(slots=True)
class _State:
    """How one key stands."""

    requests: Bucket | None
    tokens: Bucket | None
    num_running: int = 0
    num_reserved: int = 0  # tokens of the requests that have not ended
    reservations: dict[str, list[_Reservation]] = field(default_factory=dict)  # by engine request


class KeyMeter:
    """Counts for all keys; also a sink of every engine (``engine.records.Sink``), which tells what requests used. Thread-safe."""

    def __init__(self, clock: Clock = time.monotonic, now: Callable[[], datetime] | None = None) -> None:
        self._clock = clock
        self._now = now or (lambda: datetime.now(UTC))
        self._lock = threading.Lock()
        self._states: dict[str, _State] = {}
        self._stored: tuple[str, Mapping[str, int]] = ("", {})  # a day, and what the store knows of it by key
        self._unsaved: dict[tuple[str, str], int] = {}  # tokens by key and day
        self._used_at: dict[str, datetime] = {}  # not yet in the store

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def enter(self, key: ApiKey) -> None:
        """A request of this key came; `leave` when it is answered. Raises RateLimitError."""
        limits = key.limits
        with self._lock:
            self._used_at[key.id] = self._now()
            state = self._state(key)
            if limits.max_concurrent is not None and state.num_running >= limits.max_concurrent:
                raise RateLimitError(
                    f"{key.id} may have {limits.max_concurrent} requests at once", limit=limits.max_concurrent,
                    param="max_concurrent", remedy="Wait for one to end.", retry_after_s=_BUSY_RETRY_S,
                )  # fmt: skip
            if state.requests is not None:
                state.requests.refill(self._clock())
                if wait_s := state.requests.seconds_until(1):
                    allowed = state.requests.per_minute
                    raise _exceeded(key, "requests_per_minute", "requests a minute", allowed, wait_s)
                state.requests.level -= 1
            state.num_running += 1

    def leave(self, key: ApiKey) -> None:
        with self._lock:
            self._state(key).num_running -= 1

    def reserve(self, key: ApiKey, costs: Sequence[Cost]) -> None:
        """Take the tokens that engine requests may need, all or none. Raises RateLimitError."""
        total = sum(cost.total for cost in costs)
        with self._lock:
            state = self._state(key)
            self._check_day(key, state, total)
            share = 1.0
            if state.tokens is not None:
                state.tokens.refill(self._clock())
                taken = min(total, state.tokens.per_minute)
                if wait_s := state.tokens.seconds_until(taken):
                    allowed = state.tokens.per_minute
                    raise _exceeded(key, "tokens_per_minute", "tokens a minute", allowed, wait_s)
                state.tokens.level -= taken
                share = taken / total if total else 0.0
            state.num_reserved += total
            for cost in costs:
                found = state.reservations.setdefault(cost.request_id, [])
                found.append(_Reservation(cost, cost.total * share))

    def settle(self, key_id: str, request_id: str, num_output_tokens: int | None) -> None:
        """An engine request ended after so much output; None: it never ran, and costs nothing. Others are ignored."""
        with self._lock:
            state = self._states.get(key_id)
            found = state.reservations.get(request_id) if state is not None else None
            if state is None or not found:
                return
            reserved = found.pop()  # an id in use twice: its requests cost the same or one was refused
            if not found:
                del state.reservations[request_id]
            cost = reserved.cost
            used = 0 if num_output_tokens is None else cost.num_prompt_tokens + num_output_tokens
            state.num_reserved -= cost.total
            if state.tokens is not None:
                state.tokens.level += reserved.from_bucket - used
            if used:
                day = key_id, self._day()
                self._unsaved[day] = self._unsaved.get(day, 0) + used

    # ── what engines tell ───────────────────────────────────────────────────────────────────────────────────────────

    def on_request(self, record: RequestRecord) -> None:
        if record.client:
            ran = record.admitted_ns is not None
            self.settle(record.client, record.request_id, record.num_output_tokens if ran else None)

    def on_event(self, event: EngineEvent) -> None:
        if event.kind == "dead":  # these end without a record of their own
            with self._lock:
                lost = [(key, name) for name in event.request_ids for key, state in self._states.items()
                        if name in state.reservations]  # fmt: skip
            for key_id, request_id in lost:
                self.settle(key_id, request_id, None)

    def on_step(self, record: StepRecord) -> None:
        """Steps are not requests."""

    # ── days ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def used_today(self, key_id: str) -> int:
        """Tokens of ended requests, as far as this process knows."""
        day = self._day()
        known_day, stored = self._stored
        return (stored.get(key_id, 0) if known_day == day else 0) + self._unsaved.get((key_id, day), 0)

    def know(self, day: str, stored: Mapping[str, int]) -> None:
        """What the store has for a day, in place of what was known."""
        with self._lock:
            self._stored = day, dict(stored)

    def unsaved(self) -> tuple[dict[tuple[str, str], int], dict[str, datetime]]:
        """Tokens by key and day, and each key's last use: what the store does not have."""
        with self._lock:
            return dict(self._unsaved), dict(self._used_at)

    def saved(self, tokens: Mapping[tuple[str, str], int], used_at: Mapping[str, datetime]) -> None:
        """The store has these now."""
        with self._lock:
            day, stored = self._stored
            known = dict(stored)
            for (key_id, on), count in tokens.items():
                left = self._unsaved[key_id, on] - count
                if left:
                    self._unsaved[key_id, on] = left
                else:
                    del self._unsaved[key_id, on]
                if on == day:
                    known[key_id] = known.get(key_id, 0) + count
            self._stored = day, known
            for key_id, moment in used_at.items():
                if self._used_at.get(key_id) == moment:
                    del self._used_at[key_id]

    def _check_day(self, key: ApiKey, state: _State, total: int) -> None:
        budget = key.limits.daily_tokens
        if budget is None:
            return
        left = budget - self.used_today(key.id) - state.num_reserved
        if total > left:
            now = self._now()
            midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
            raise RateLimitError(
                f"{key.id} may use {budget} tokens a day; {max(0, left)} are left and this request may take {total}",
                limit=budget, param="daily_tokens", retry_after_s=(midnight - now).total_seconds(),
                remedy="Send a smaller max_tokens, or come again when the day is over in UTC.",
            )  # fmt: skip

    def _day(self) -> str:
        return self._now().date().isoformat()

    # ── headers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def headers(self, key: ApiKey) -> list[tuple[bytes, bytes]]:
        """OpenAI's x-ratelimit-* of the rates that the key has."""
        with self._lock:
            state, now = self._state(key), self._clock()
            found: list[tuple[bytes, bytes]] = []
            for name, bucket in (("requests", state.requests), ("tokens", state.tokens)):
                if bucket is not None:
                    bucket.refill(now)
                    facts = {
                        "limit": str(bucket.per_minute),
                        "remaining": str(max(0, int(bucket.level))),
                        "reset": f"{bucket.seconds_until(bucket.per_minute):.3f}s",
                    }
                    found += [
                        (f"x-ratelimit-{what}-{name}".encode(), v.encode()) for what, v in facts.items()
                    ]
            return found

    def _state(self, key: ApiKey) -> _State:
        found = self._states.get(key.id)
        if found is None:
            found = self._states[key.id] = _new_state(key.limits, self._clock())
        return found


@dataclass(frozen=True, slots=True)
class KeyUse:
    """The key of the request that this task answers, and where its use is counted."""

    key: ApiKey
    meter: KeyMeter


_use: ContextVar[KeyUse | None] = ContextVar("quire_key_use", default=None)


@contextmanager
def using(use: KeyUse) -> Iterator[None]:
    """What runs inside is a request of this key."""
    token = _use.set(use)
    try:
        yield
    finally:
        _use.reset(token)


def client_in_use(otherwise: str = "") -> str:
    """Whom an engine request counts for: the key that asks, else who the caller says."""
    use = _use.get()
    return otherwise if use is None else use.key.id


@contextmanager
def reserved(costs: Callable[[], Sequence[Cost]]) -> Iterator[None]:
    """Around submitting engine requests: their tokens are taken from the key's limits, and given back if that fails.

    Without a key `costs` is not asked. Raises RateLimitError.
    """
    use = _use.get()
    if use is None:
        yield
        return
    taken = costs()
    use.meter.reserve(use.key, taken)
    try:
        yield
    except BaseException:
        for cost in taken:
            use.meter.settle(use.key.id, cost.request_id, None)
        raise


def _new_state(limits: KeyLimits, now: float) -> _State:
    def bucket(per_minute: int | None) -> Bucket | None:
        return None if per_minute is None else Bucket(per_minute, per_minute, now)

    return _State(bucket(limits.requests_per_minute), bucket(limits.tokens_per_minute))


def _exceeded(key: ApiKey, param: str, what: str, limit: int, wait_s: float) -> RateLimitError:
    return RateLimitError(
        f"{key.id} may have {limit} {what}", limit=limit, param=param, retry_after_s=wait_s,
        remedy=f"There is room again in {wait_s:.1f} s.",
    )  # fmt: skip
