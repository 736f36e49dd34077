"""Schedules: each due time fires once, whatever is killed; missed, overlapping and impossible ones are written down."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.jobs import Jobs, JobState
from workbench.jobs.claims import Claims
from workbench.jobs.process_id import ProcessId
from workbench.runs.errors import (
    NotebookParameterError,
    ScheduleError,
    SchedulePastError,
    UnknownNotebookError,
    UnknownScheduleError,
)
from workbench.runs.schedules import Schedules
from workbench.runs.trigger import Trigger
from workbench.store import Store, schedule_occurrences, utc_text
from workbench.store import jobs as jobs_table

NOW = datetime(2026, 11, 20, 12, 0, 30, tzinfo=UTC)


@pytest.fixture
def schedules(store: Store, home: Path) -> Schedules:
    return Schedules(store, home)


def end_jobs(store: Store) -> None:
    """As if the runner had done them all."""
    with store.begin() as connection:
        connection.execute(jobs_table.update().values(state=JobState.DONE.value))


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


# ── when ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "zone", "first"),
    [
        ({"cron": "* * * * *"}, "UTC", "2026-11-20T12:01:00"),
        ({"cron": "0 3 * * *"}, "Europe/Berlin", "2026-11-21T02:00:00"),
        ({"cron": "0 0 * * 0"}, "UTC", "2026-11-22T00:00:00"),  # a Sunday
        ({"cron": "0 0 * * 7"}, "UTC", "2026-11-22T00:00:00"),
        ({"cron": "0 0 * * 1-5"}, "UTC", "2026-11-23T00:00:00"),  # a Monday
        ({"cron": "0 0 * * sat"}, "UTC", "2026-11-21T00:00:00"),
        ({"every_s": 90}, "UTC", "2026-11-20T12:02:00"),
        ({"at": "2026-12-01T03:00"}, "Europe/Berlin", "2026-12-01T02:00:00"),
        ({"at": "2026-12-01T03:00:00Z"}, "Europe/Berlin", "2026-12-01T03:00:00"),
    ],
)
def test_first_due_time(values: dict[str, Any], zone: str, first: str) -> None:
    assert Trigger(values, zone, NOW).first(NOW) == datetime.fromisoformat(f"{first}+00:00")


def test_a_clock_change_moves_a_local_time_in_utc() -> None:
    trigger = Trigger({"cron": "0 3 * * *"}, "Europe/Berlin", NOW)
    before = datetime(2027, 3, 27, 2, 0, tzinfo=UTC)  # 03:00 in winter
    assert trigger.after(before) == datetime(2027, 3, 28, 1, 0, tzinfo=UTC)  # 03:00 in summer


@pytest.mark.parametrize(
    ("when", "error"),
    [
        ({"at": "2026-11-20T12:00:29+00:00"}, SchedulePastError),
        ({"at": "2020-01-01"}, SchedulePastError),
        ({"at": "tomorrow"}, ScheduleError),
        ({"cron": "0 3 * *"}, ScheduleError),
        ({"cron": "61 * * * *"}, ScheduleError),
        ({"cron": "0 0 * * 8"}, ScheduleError),
        ({"cron": "0 0 30 2 *"}, ScheduleError),
        ({"every_s": 0}, ScheduleError),
        ({"every_s": float("nan")}, ScheduleError),
        ({}, ScheduleError),
        ({"every_s": 60, "cron": "* * * * *"}, ScheduleError),
        ({"every_s": 60, "timezone": "Mars/Olympus"}, ScheduleError),
        ({"every_s": 60, "grace_s": -1}, ScheduleError),
    ],
)
def test_a_schedule_that_cannot_hold_is_refused(
    schedules: Schedules, when: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        schedules.add("nightly", "probe", **{"timezone": "UTC", **when}, now=NOW)
    assert schedules.list() == []


def test_what_could_not_run_is_refused_when_it_is_added(schedules: Schedules) -> None:
    with pytest.raises(UnknownNotebookError):
        schedules.add("a", "nothing", every_s=60)
    with pytest.raises(NotebookParameterError, match="Did you mean"):
        schedules.add("a", "probe", {"notes": "x"}, every_s=60)
    schedules.add("a", "probe", every_s=60)
    with pytest.raises(ScheduleError, match="already"):
        schedules.add("a", "probe", every_s=60)


# ── firing ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("database")
def test_it_fires_when_due_and_only_then(schedules: Schedules, store: Store, jobs: Jobs) -> None:
    made = schedules.add("a", "probe", {"n": 5}, every_s=60, now=NOW)
    assert made.next_due_at == utc_text(at(60))
    assert schedules.fire_due(at(59)) == []
    (fired,) = schedules.fire_due(at(60.5))
    assert (fired.outcome, fired.due_at, fired.coalesced) == ("fired", utc_text(at(60)), 0)
    job = jobs.get(fired.job_id or "")
    assert job.spec == {"notebook": "probe", "parameters": {"n": 5}}
    assert job.state is JobState.QUEUED
    assert schedules.fire_due(at(61)) == []
    end_jobs(store)
    assert [each.outcome for each in schedules.fire_due(at(120))] == ["fired"]
    assert [each.job_state for each in schedules.history("a")] == [JobState.QUEUED, JobState.DONE]


@pytest.mark.usefixtures("database")
def test_missed_times_run_once_within_the_grace(schedules: Schedules) -> None:
    schedules.add("a", "probe", every_s=60, now=NOW)
    (fired,) = schedules.fire_due(at(60 * 10 + 5))  # nobody ran for ten minutes
    assert (fired.outcome, fired.coalesced, fired.due_at) == ("fired", 9, utc_text(at(600)))
    assert schedules.list()[0].next_due_at == utc_text(at(660))


def test_a_clock_that_jumps_fires_no_time_twice(
    schedules: Schedules, store: Store, jobs: Jobs, fault: Any
) -> None:
    schedules.add("a", "probe", every_s=60, grace_s=30, now=NOW)
    hour = 3600
    (ahead,) = schedules.fire_due(at(5 * hour + 45))  # the clock jumped five hours ahead
    assert (ahead.outcome, ahead.coalesced) == ("missed", 299)
    end_jobs(store)
    assert schedules.fire_due(at(60)) == []  # and back again: those times were decided
    assert schedules.fire_due(at(5 * hour)) == []
    assert [each.outcome for each in schedules.fire_due(at(5 * hour + 60))] == ["fired"]
    # A job of another machine, whose clock is hours behind ours or ahead of it, lives while its heartbeat changes.
    job = jobs.submit("probe", {"steps": 1})
    claims = Claims(store, foreign_silence_s=0.2)
    there = ProcessId("elsewhere", "boot", 7, "1")
    assert claims.claim(job.id, there)
    for hours in (-5, 5, 0):
        beat = utc_text(datetime.now(UTC) + timedelta(hours=hours))
        with store.begin() as connection:
            connection.execute(jobs_table.update().where(jobs_table.c.id == job.id).values(heartbeat_at=beat))
        assert claims.recover() == []
    time.sleep(0.3)
    assert claims.recover() == [job.id]
    fault(
        "the clock jumps by hours", fails="nothing: intervals (deadlines, timeouts, rates, the watchdog) count by the monotonic clock",
        goes_on="requests and jobs; a job of this machine is known by its process, one of another machine by heartbeats that change",
        afterwards=f"ahead: due times that were jumped over are one, run if within its grace, else written down as `{ahead.outcome}`; back: "
        "schedules wait until the clock is there again, no due time fires twice",
    )  # fmt: skip


def test_too_late_is_written_down_and_does_not_run(schedules: Schedules, jobs: Jobs) -> None:
    schedules.add("nightly", "probe", cron="0 3 * * *", timezone="UTC", grace_s=3600, now=NOW)
    (missed,) = schedules.fire_due(datetime(2026, 11, 22, 8, 0, tzinfo=UTC))
    assert (missed.outcome, missed.coalesced, missed.job_id) == ("missed", 1, None)
    assert "18000 s late" in missed.reason
    assert jobs.list() == []
    assert schedules.list()[0].next_due_at == utc_text(datetime(2026, 11, 23, 3, 0, tzinfo=UTC))


@pytest.mark.usefixtures("database")
def test_an_overlapping_run_is_skipped_and_written_down(schedules: Schedules, store: Store) -> None:
    schedules.add("a", "probe", every_s=60, now=NOW)
    (first,) = schedules.fire_due(at(60))
    (second,) = schedules.fire_due(at(120))
    assert (second.outcome, second.job_id) == ("overlap", None)
    assert first.job_id is not None
    assert first.job_id in second.reason
    end_jobs(store)
    assert schedules.fire_due(at(180))[0].outcome == "fired"


def test_once_means_once(schedules: Schedules) -> None:
    schedules.add("a", "probe", at=utc_text(at(60)), now=NOW)
    assert [each.outcome for each in schedules.fire_due(at(61))] == ["fired"]
    assert schedules.fire_due(at(10_000)) == []
    assert schedules.list()[0].next_due_at is None
    schedules.enable("a", False)
    with pytest.raises(SchedulePastError):
        schedules.enable("a", True, now=at(10_000))


def test_a_notebook_that_is_gone_is_written_down(schedules: Schedules, home: Path) -> None:
    schedules.add("a", "probe", every_s=60, now=NOW)
    (home / "notebooks" / "probe.ipynb").unlink()
    (refused,) = schedules.fire_due(at(60))
    assert (refused.outcome, refused.job_id) == ("refused", None)
    assert "no notebook" in refused.reason


@pytest.mark.usefixtures("database")
def test_pause_resume_and_remove(schedules: Schedules) -> None:
    schedules.add("a", "probe", every_s=60, now=NOW)
    schedules.enable("a", False)
    assert schedules.fire_due(at(600)) == []
    assert schedules.next_due() is None
    schedules.enable("a", True, now=at(600))
    assert schedules.fire_due(at(600)) == [], "what was due meanwhile is not made up for"
    schedules.fire_due(at(660))
    schedules.remove("a")
    assert schedules.list() == []
    assert len(schedules.history("a")) == 1, "its history stays"
    with pytest.raises(UnknownScheduleError):
        schedules.remove("a")


@pytest.mark.usefixtures("database")
def test_many_schedulers_fire_each_time_once(schedules: Schedules, store: Store, home: Path) -> None:
    for i in range(5):
        schedules.add(f"s{i}", "probe", every_s=60, now=NOW)
    others = [Schedules(store, home) for _ in range(6)]
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda other=other: found.extend(each.id for each in other.fire_due(at(60))))
        for other in others
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(set(found)) == 5


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.full)])
def test_a_killed_scheduler_neither_loses_nor_doubles_a_time(
    kills: int, schedules: Schedules, store: Store, jobs: Jobs, home: Path
) -> None:
    """The job is ended at once here, so that every second of the schedule may fire."""
    generator = random.Random(0)
    schedules.add("a", "probe", every_s=1)
    begun = time.monotonic()
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-m", "workbench.runs.scheduler"], env=os.environ.copy())
        deadline = time.monotonic() + generator.uniform(1.5, 3.5)
        while time.monotonic() < deadline:
            end_jobs(store)
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    end_jobs(store)
    schedules.fire_due()
    elapsed = time.monotonic() - begun
    history = schedules.history("a", 1000)
    ids = {each.id for each in history}
    assert len(ids) == len(history), "no time was decided twice"
    due = sorted(datetime.fromisoformat(each.due_at) for each in history)
    accounted = sum(1 + each.coalesced for each in history)
    assert (due[-1] - datetime.fromisoformat(schedules.list()[0].created_at)).total_seconds() == accounted
    assert accounted >= int(elapsed) - 1
    with store.read() as connection:
        linked = set(connection.execute(sa.select(schedule_occurrences.c.job_id)).scalars()) - {None}
    assert linked == {job.id for job in jobs.list(limit=1000)}, (
        "each job belongs to a time, each time has its job"
    )


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    every=st.integers(5, 50),
    grace=st.integers(0, 200),
    steps=st.lists(st.tuples(st.floats(0, 120), st.booleans()), min_size=1, max_size=12),
)
def test_every_due_time_is_accounted_for_once(
    schedules: Schedules, store: Store, every: int, grace: int, steps: list[tuple[float, bool]]
) -> None:
    """However late and irregular the scheduler looks, and whether the jobs end or not."""
    name = f"s{time.monotonic_ns()}"
    schedules.add(name, "probe", every_s=every, grace_s=grace, now=NOW)
    now = NOW
    for seconds, ends in steps:
        now += timedelta(seconds=seconds)
        for found in schedules.fire_due(now):
            late = (now - datetime.fromisoformat(found.due_at)).total_seconds()
            assert 0 <= late < every, "the newest due time is decided, not an old one"
            assert (found.outcome == "missed") == (late > grace)
            assert (found.job_id is not None) == (found.outcome == "fired")
        if ends:
            end_jobs(store)
    schedules.remove(name)
    history = schedules.history(name, 1000)
    passed = int((now - NOW).total_seconds() / every + 1e-9)
    assert sum(1 + each.coalesced for each in history) == passed
    assert len({each.due_at for each in history}) == len(history)


def test_the_scheduler_ends_when_it_is_told_to(home: Path) -> None:
    process = subprocess.Popen([sys.executable, "-m", "workbench.runs.scheduler"], env=os.environ.copy())
    time.sleep(1.0)
    process.terminate()
    assert process.wait(10) in (0, -signal.SIGTERM)  # the signal may come before it is heeded
