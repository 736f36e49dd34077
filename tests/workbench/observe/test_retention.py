"""Retention: what is older goes, everywhere, and the newest file and whatever is younger stays."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa

from engine.records import RequestRecord
from engine.request import FinishReason
from workbench.jobs import Jobs
from workbench.observe import feedback, request_reader, segments
from workbench.observe.request_log import RequestLog
from workbench.observe.retention import RetentionKeeper, enforce, kept
from workbench.settings import Settings
from workbench.store import feedback_outbox, jobs, open_store, utc_text
from workbench.ui.components.retention_facts import rules

DAY_NS = 24 * 3600 * 10**9


def log_request(home: Path, request_id: str, days_ago: float) -> None:
    at = time.monotonic_ns() - int(days_ago * DAY_NS)
    with RequestLog(home) as log:
        log.sink("m", "").on_request(
            RequestRecord(request_id, at, at, at, at, 1, 0, 1, 0, FinishReason.STOP, (at,))
        )


def ids(home: Path) -> list[str]:
    return sorted(row["request_id"] for row in request_reader.read(home).to_pylist())


def test_what_is_older_goes_and_the_newest_file_stays(tmp_path: Path) -> None:
    for name, days_ago in (("old", 40), ("older", 50), ("young", 5), ("last", 60)):
        log_request(tmp_path, name, days_ago)  # one file each; the newest file holds the oldest request
    with open_store(tmp_path) as store:
        table = Jobs(store, tmp_path)
        ended = [table.submit("seed_demo", {}, title="x", device="none") for _ in range(2)]
        for job, days_ago in zip(ended, (40, 5), strict=True):
            Path(job.log_path).parent.mkdir(exist_ok=True)
            Path(job.log_path).write_text("what it said")
            feedback.record(store, job.id, "comment", "what I say")
            moment = utc_text(datetime.now(UTC) - timedelta(days=days_ago))
            with store.begin() as connection:
                connection.execute(sa.update(jobs).where(jobs.c.id == job.id).values(ended_at=moment))
                same = feedback_outbox.c.request_id == job.id
                connection.execute(sa.update(feedback_outbox).where(same).values(created_at=moment))
        running = table.submit("seed_demo", {}, title="x", device="none")
        Path(running.log_path).write_text("what it says")
        removed = enforce(tmp_path, store, 30)
        assert (removed.request_log_files, removed.feedback, removed.job_logs) == (2, 1, 1)
        assert removed.request_log_bytes > 0
        left = kept(tmp_path, store)
        assert (left.request_log_files, left.feedback, left.job_logs) == (2, 1, 2)
        assert not any(
            (enforce(tmp_path, store, 30).request_log_files, enforce(tmp_path, store, 30).feedback)
        )
    assert ids(tmp_path) == ["last", "young"]


def test_the_keeper_enforces_it_by_itself_and_only_where_it_is_set(tmp_path: Path) -> None:
    for name in ("old", "newest"):
        log_request(tmp_path, name, 40)
    with open_store(tmp_path) as store:
        for days, expected in ((None, 2), (30.0, 1)):
            keeper = RetentionKeeper(tmp_path, store, days, first_after_s=0.0)
            keeper.start()
            deadline = time.monotonic() + 5
            while (
                len(segments.parquet_files(segments.folder_of(tmp_path))) > expected
                and time.monotonic() < deadline
            ):
                time.sleep(0.01)
            keeper.close()
            assert len(ids(tmp_path)) == expected


def test_what_is_kept_is_counted_and_the_rules_say_for_how_long(tmp_path: Path) -> None:
    log_request(tmp_path, "one", 0)
    with open_store(tmp_path) as store:
        now = kept(tmp_path, store)
    assert (now.request_log_files, now.feedback, now.job_logs) == (1, 0, 0)
    assert now.request_log_bytes > 0
    assert "30 days" in rules(Settings(home_dir=tmp_path, retention_days=30))[0]
    assert "until they are erased" in rules(Settings(home_dir=tmp_path))[0]
