"""What waits in an engine: how long it may, in which order it begins, and when there is no room for more."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError, InvalidRequestError, QueueFullError
from engine.queue_deadlines import QueueDeadlines
from engine.queue_limit import AUTO_CACHES, AUTO_ROWS, Backlog, QueueLimit
from engine.request import FinishReason, Request
from engine.sampling_params import SamplingParams

SECOND = 1_000_000_000


# ── the longest wait ────────────────────────────────────────────────────────────────────────────────────────────────


def test_who_waited_too_long_is_ended_and_who_runs_is_not(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(max_num_seqs=1, max_queue_seconds=30)
    now = time.monotonic_ns()
    for name, waited_s in (("runs", 0), ("waits", 29), ("late", 31)):
        request = rig.engine.make_request([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True))
        rig.engine.add(replace(request, request_id=name, arrival_ns=now - waited_s * SECOND))
        rig.step()
    rig.run()
    ends = {name: rig.last(name).finish_reason for name in ("runs", "waits", "late")}
    assert ends == {"runs": FinishReason.LENGTH, "waits": FinishReason.LENGTH, "late": FinishReason.TIMEOUT}
    assert "at most 30 s" in (rig.last("late").error or "")
    assert rig.requests["late"].admitted_ns is None
    assert rig.engine.stats().finished["timeout"] == 1


def test_one_that_was_preempted_is_not_ended_for_waiting(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(num_blocks=6, block_size=4, max_model_len=24, max_queue_seconds=0.05)
    for name in ("a", "b"):
        rig.add(name, [1, 2, 3, 4, 5], max_tokens=16, ignore_eos=True)
    while not rig.engine.stats().preemptions:
        rig.step()
    time.sleep(0.06)
    rig.run()
    assert rig.last("b").finish_reason is FinishReason.LENGTH


# ── deadlines of requests' own ──────────────────────────────────────────────────────────────────────────────────────


def test_a_deadline_ends_a_request_whether_it_waits_or_runs(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(max_num_seqs=2)
    now = time.monotonic_ns()
    params = SamplingParams(max_tokens=500, ignore_eos=True)
    for name, timeout_s in (("runs", 1000.0), ("goes on", None), ("waits", 1000.0), ("is late", 5.0)):
        request = rig.engine.make_request(
            [1, 2, 3], params, request_id=name, arrival_ns=now - 6 * SECOND, timeout_s=timeout_s
        )
        rig.engine.add(request)
    for _ in range(5):
        rig.step()
    assert "is late" in rig.requests
    for name in ("runs", "waits"):  # their time is over from now on
        seq = rig.engine._scheduler.get(name)
        rig.engine._deadlines.add(replace(seq.request, deadline_ns=now))
    rig.run()
    ends = {name: rig.last(name).finish_reason.value for name in ("runs", "goes on", "waits", "is late")}
    assert ends == {"runs": "timeout", "goes on": "length", "waits": "timeout", "is late": "timeout"}
    assert rig.requests["runs"].num_output_tokens > 0
    assert (rig.requests["waits"].admitted_ns, rig.requests["is late"].admitted_ns) == (None, None)
    assert rig.last("runs").error == "its 6 s were over while it ran"
    assert rig.last("is late").error == "its 5 s were over while it waited for its turn"
    assert rig.engine.stats().num_free_blocks == rig.engine.stats().num_blocks


def test_an_id_that_was_used_again_is_not_ended_by_the_deadline_of_its_first_request() -> None:
    first = Request("again", (1,), SamplingParams(), arrival_ns=0, deadline_ns=10)
    second = replace(first, arrival_ns=5, deadline_ns=None)
    deadlines = QueueDeadlines(None, get={"again": second}.get, has_begun=lambda request: True)
    deadlines.add(first)
    assert deadlines.take_overdue(20) == []


def test_requests_that_ended_before_their_deadline_are_forgotten() -> None:
    live: dict[str, Request] = {}
    deadlines = QueueDeadlines(None, get=live.get, has_begun=lambda request: True)
    for i in range(10_000):
        request = Request(f"r{i}", (1,), SamplingParams(), arrival_ns=i, deadline_ns=10**15 + i)
        live[request.request_id] = request
        deadlines.add(request)
        live.pop(f"r{i - 10}", None)
    assert len(deadlines._deadlines) <= 64
    ended = deadlines.take_overdue(10**16)
    assert [each.request_id for each in ended] == [f"r{i}" for i in range(9_990, 10_000)]


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf"), 86_401.0])
def test_a_timeout_out_of_range_is_refused(make_rig: Callable[..., Any], timeout_s: float) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        make_rig().engine.make_request([1], SamplingParams(), timeout_s=timeout_s)
    assert refused.value.param == "timeout_s"


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lower_priority_begins_first(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(max_num_seqs=1)
    for name, priority in (("runs", 0), ("later", 1), ("now", 0), ("urgent", -1)):
        request = rig.engine.make_request(
            [1, 2], SamplingParams(max_tokens=2), request_id=name, priority=priority
        )
        rig.engine.add(request)
        rig.step()
    rig.run()
    began = sorted(rig.requests.values(), key=lambda record: record.admitted_ns)
    assert [record.request_id for record in began] == ["runs", "urgent", "now", "later"]


def test_a_client_with_many_requests_does_not_keep_another_waiting(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(max_num_seqs=2)
    for i in range(30):
        rig.engine.add(
            rig.engine.make_request([1] * 20, SamplingParams(max_tokens=4), request_id=f"m{i}", client="many")
        )
    rig.step()
    rig.engine.add(
        rig.engine.make_request([2] * 20, SamplingParams(max_tokens=4), request_id="one", client="one")
    )
    rig.run()
    began = sorted(rig.requests.values(), key=lambda record: record.admitted_ns)
    assert [record.request_id for record in began].index("one") <= 4  # behind the two that ran, and one each


# ── giant prompts ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_giant_prompt_does_not_stall_the_tokens_of_others(make_rig: Callable[..., Any]) -> None:
    """Each step that reads a part of it brings every other request its token."""
    rig = make_rig(max_batched_tokens=32)
    for name in ("a", "b"):
        rig.add(name, [1, 2, 3], max_tokens=200, ignore_eos=True)
    rig.step()
    rig.add("giant", [5] * 900, max_tokens=2)
    rig.run()
    reading = [step for step in rig.steps if any(name == "giant" for name, _ in step.rows)]
    assert len(reading) >= 900 // 32
    assert all({"a", "b"} <= {name for name, _ in step.rows} for step in reading)


# ── the limit ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_more_than_may_wait_is_refused_and_not_counted(unit: str) -> None:
    limit = QueueLimit(4, None) if unit == "requests" else QueueLimit(None, 40)
    limit.enter(Backlog(3, 30), Backlog(0, 0), 0)
    with pytest.raises(QueueFullError, match=unit) as caught:
        limit.enter(Backlog(2, 20), Backlog(3, 30), 0)
    assert caught.value.retry_after_s >= 1
    assert (caught.value.value, caught.value.limit) == ((5, 4) if unit == "requests" else (50, 40))
    assert limit.num_refused == 2
    limit.enter(Backlog(1, 10), Backlog(3, 30), 0)


def test_whatever_comes_to_an_empty_queue_is_taken() -> None:
    QueueLimit(4, 40).enter(Backlog(100, 1000), Backlog(0, 0), 0)


def test_when_to_come_again_follows_from_how_fast_the_queue_moved() -> None:
    limit = QueueLimit(100, None)
    limit.enter(Backlog(100, 100), Backlog(0, 0), 0)
    limit.sample(Backlog(100, 100), 0)
    with pytest.raises(QueueFullError) as caught:  # ten left in five seconds; thirty have to leave
        limit.enter(Backlog(40, 40), Backlog(90, 90), 5 * SECOND)
    assert caught.value.retry_after_s == 15
    with pytest.raises(QueueFullError) as caught:  # nothing moves
        limit.enter(Backlog(40, 40), Backlog(100, 100), 5 * SECOND)
    assert caught.value.retry_after_s == 60


def test_automatic_limits_are_in_proportion_to_the_engine() -> None:
    auto = QueueLimit.of(
        EngineConfig(model="m", max_num_seqs=4, max_queued_requests="auto", max_queued_tokens="auto"), 100
    )
    assert (auto.max_requests, auto.max_tokens) == (4 * AUTO_ROWS, 100 * AUTO_CACHES)
    none = QueueLimit.of(EngineConfig(model="m"), 100)
    assert (none.max_requests, none.max_tokens) == (None, None)


@pytest.mark.parametrize(
    "setting",
    [
        {"max_queued_requests": 0}, {"max_queued_tokens": "all"}, {"max_queue_seconds": 0},
        {"client_weights": {"a": -1}}, {"client_weights": {"a": float("nan")}},
    ],
)  # fmt: skip
def test_limits_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        EngineConfig(model="m", **setting)
