"""What keys may ask for: by a clock of the test's own, and what a restart remembers."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.records import EngineEvent
from workbench.access import keys
from workbench.access.key_ring import KeyRing
from workbench.access.keys import ApiKey, KeyLimits
from workbench.access.limits import Cost, KeyMeter, RateLimitError
from workbench.access.principal import Principal, Right
from workbench.store import Store, open_store

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Rig:
    """A meter and one key, at a time that the test sets."""

    def __init__(self, **limits: int) -> None:
        self.seconds = 0.0
        self.meter = KeyMeter(lambda: self.seconds, lambda: NOON + timedelta(seconds=self.seconds))
        principal = Principal("key-a", frozenset({Right.INFER}))
        self.key = ApiKey("key-a", "a", principal, KeyLimits(**limits), "", "", None, None, None)

    def ask(self, request_id: str, prompt: int, output: int) -> None:
        self.meter.reserve(self.key, [Cost(request_id, prompt, output)])

    def end(self, request_id: str, output: int | None) -> None:
        self.meter.settle("key-a", request_id, output)

    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.meter.headers(self.key)}


def refused(act: Callable[[], object]) -> RateLimitError:
    with pytest.raises(RateLimitError) as caught:
        act()
    return caught.value


def test_requests_a_minute_flow_back_steadily() -> None:
    rig = Rig(requests_per_minute=6)
    for _ in range(6):
        rig.meter.enter(rig.key)
    error = refused(lambda: rig.meter.enter(rig.key))
    assert (error.param, error.limit, error.retry_after_s) == ("requests_per_minute", 6, 10)
    assert rig.headers()["x-ratelimit-reset-requests"] == "60.000s"
    rig.seconds = 10.0
    rig.meter.enter(rig.key)
    refused(lambda: rig.meter.enter(rig.key))
    assert rig.headers()["x-ratelimit-remaining-requests"] == "0"


def test_requests_at_once_are_counted_until_they_are_answered() -> None:
    rig = Rig(max_concurrent=2)
    rig.meter.enter(rig.key)
    rig.meter.enter(rig.key)
    assert refused(lambda: rig.meter.enter(rig.key)).param == "max_concurrent"
    rig.meter.leave(rig.key)
    rig.meter.enter(rig.key)


def test_tokens_are_taken_at_once_and_settled_by_what_was_used() -> None:
    rig = Rig(tokens_per_minute=600)
    rig.ask("a", 100, 400)
    assert rig.headers()["x-ratelimit-remaining-tokens"] == "100"
    assert refused(lambda: rig.ask("b", 100, 100)).retry_after_s == 10
    rig.end("a", 20)
    assert rig.headers()["x-ratelimit-remaining-tokens"] == "480"
    rig.end("a", 20)
    assert rig.headers()["x-ratelimit-remaining-tokens"] == "480", "an end that is told twice counts once"
    rig.ask("c", 100, 100)
    rig.end("c", None)
    assert rig.headers()["x-ratelimit-remaining-tokens"] == "480", "what never ran costs nothing"
    assert rig.meter.used_today("key-a") == 120


def test_a_request_larger_than_a_minute_waits_for_a_full_bucket_and_leaves_it_in_debt() -> None:
    rig = Rig(tokens_per_minute=60)
    rig.ask("a", 100, 100)
    rig.end("a", 80)
    assert refused(lambda: rig.ask("b", 1, 0)).retry_after_s == 121, (
        "180 used of 60: 120 s of debt, 1 s for one token"
    )
    rig.seconds = 121.1
    rig.ask("b", 1, 0)


def test_several_answers_are_reserved_together_or_not_at_all() -> None:
    rig = Rig(tokens_per_minute=100)
    refused(
        lambda: [rig.ask("a", 50, 10), rig.meter.reserve(rig.key, [Cost("b", 20, 10), Cost("b-1", 0, 20)])]
    )
    rig.meter.reserve(rig.key, [Cost("b", 20, 5), Cost("b-1", 0, 5)])
    rig.end("b", 5)
    rig.end("b-1", 0)
    assert rig.meter.used_today("key-a") == 25, "the prompt counts once"


def test_a_days_budget_is_never_exceeded_and_begins_again_at_midnight_utc() -> None:
    rig = Rig(daily_tokens=100)
    rig.ask("a", 10, 50)
    assert refused(lambda: rig.ask("b", 10, 31)).param == "daily_tokens"
    rig.ask("b", 10, 30)
    rig.end("a", 50)
    rig.end("b", 30)
    error = refused(lambda: rig.ask("c", 1, 0))
    assert error.retry_after_s == 12 * 3600
    rig.seconds = 12 * 3600.0
    rig.ask("c", 10, 90)


def test_requests_of_an_engine_that_died_are_given_back() -> None:
    rig = Rig(daily_tokens=100)
    rig.ask("a", 10, 90)
    rig.meter.on_event(EngineEvent("dead", 0, "gone", ("a", "unknown")))
    rig.ask("b", 10, 90)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.floats(0, 30)), max_size=25), st.randoms()
)
def test_what_was_used_is_what_the_ended_requests_used(
    asked: list[tuple[int, int, float]], random: object
) -> None:
    """Whatever is asked and ends in whatever order: nothing stays reserved, use is exact, the budget holds at every moment."""
    rig, running, used = Rig(tokens_per_minute=100, daily_tokens=400), {}, 0
    for number, (prompt, output, pause_s) in enumerate(asked):
        rig.seconds += pause_s
        try:
            rig.ask(str(number), prompt, output)
        except RateLimitError:
            continue
        running[str(number)] = prompt, output
        assert used + sum(map(sum, running.values())) <= 400
        if random.random() < 0.6:  # type: ignore[attr-defined]
            name = random.choice(sorted(running))  # type: ignore[attr-defined]
            size, most = running.pop(name)
            ran = random.randint(0, most)  # type: ignore[attr-defined]
            rig.end(name, ran)
            used += size + ran
    for name, (size, most) in running.items():
        rig.end(name, most)
        used += size + most
    assert rig.meter.used_today("key-a") == used
    assert rig.meter._states["key-a"].num_reserved == 0 if "key-a" in rig.meter._states else not used
    rig.seconds += 24 * 3600
    assert int(rig.headers()["x-ratelimit-remaining-tokens"]) == 100


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_a_days_use_outlives_the_process_and_is_shared_by_servers(store: Store, home: Path) -> None:
    made = keys.create(store, "a", [Right.INFER], KeyLimits(daily_tokens=100))
    first, second = KeyRing(store), KeyRing(open_store(home))

    def use(ring: KeyRing, name: str, tokens: int) -> None:
        ring.meter.enter(made.key)
        ring.meter.reserve(made.key, [Cost(name, tokens, 0)])
        ring.meter.settle(made.key.id, name, 0)
        ring.meter.leave(made.key)

    for ring in (first, second):
        ring.refresh()
    use(first, "a", 30)
    first.save()
    first.save()  # nothing twice
    use(second, "b", 40)
    second.save()
    use(first, "c", 5)
    first.refresh()
    assert first.meter.used_today(made.key.id) == 75, "what is not saved yet counts too"
    with pytest.raises(RateLimitError):
        use(first, "d", 30)
    first.close()
    second.close()
    second._store.close()
    after = KeyRing(store)
    after.refresh()
    assert after.meter.used_today(made.key.id) == 75
    assert keys.listed(store)[0].last_used_at is not None
    after.close()
