"""Jobs in child processes: done, failed, cancelled, killed, resumed; what they stored stays whatever happens."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.jobs import (
    Jobs,
    JobSpecError,
    JobState,
    JobStateError,
    JobTimeoutError,
    UnknownJobError,
    UnknownJobKindError,
)
from workbench.jobs.model import error_facts
from workbench.jobs.process_id import ProcessId
from workbench.store import Store, StoreFullError
from workbench.store import jobs as table

ROOT = Path(__file__).resolve().parents[3]
Runner = Callable[..., object]


def counted(jobs: Jobs, job_id: str) -> int:
    return (jobs.get(job_id).partial or {}).get("counted", 0)


def make_resumable(store: Store, job_id: str) -> None:
    """Give a probe a kind that is resumed: the real ones train for minutes."""
    with store.begin() as connection:
        connection.execute(table.update().where(table.c.id == job_id).values(kind="finetune"))


@pytest.mark.usefixtures("database")
def test_a_job_runs_in_a_process_of_its_own(jobs: Jobs, start_runner: Runner) -> None:
    job = jobs.submit("probe", {"steps": 3}, title="Three", device="none")
    assert (job.state, job.title, job.device) == (JobState.QUEUED, "Three", "none")
    start_runner()
    seen: list[float] = []
    done = jobs.wait(job.id, 30, on_progress=lambda fraction, message: seen.append(fraction))
    assert done.state is JobState.DONE
    assert done.result == {"counted": 3, "resumed_at": 0}
    assert (done.fraction, done.partial, done.error) == (1.0, {"counted": 3}, None)
    assert done.pid not in (None, os.getpid())
    assert done.started_at is not None
    assert done.ended_at is not None
    assert job.created_at < done.started_at < done.ended_at
    assert seen == sorted(seen)


def test_a_failure_keeps_the_typed_error_and_what_was_stored(jobs: Jobs, start_runner: Runner) -> None:
    start_runner()
    failed = jobs.wait(jobs.submit("probe", {"steps": 5, "fail_at": 2, "step_s": 0.01}).id, 30)
    assert failed.state is JobState.FAILED
    assert failed.partial == {"counted": 2}
    assert failed.error is not None
    assert failed.error["code"] == "probe_failed"
    assert failed.error["value"] == 2
    assert failed.error["remedy"]
    assert "step 2 failed" in Path(failed.log_path).read_text()


def test_cancel_ends_a_running_job_and_keeps_what_there_is(
    jobs: Jobs, start_runner: Runner, eventually: Callable[..., bool]
) -> None:
    start_runner()
    job = jobs.submit("probe", {"steps": 1000, "step_s": 0.05})
    assert eventually(lambda: counted(jobs, job.id) > 2)
    jobs.cancel(job.id)
    ended = jobs.wait(job.id, 10)
    assert ended.state is JobState.CANCELLED
    assert ended.partial is not None
    assert 2 < ended.partial["counted"] < 1000
    assert ended.result is None


def test_cancel_before_the_start_means_it_never_runs(jobs: Jobs, start_runner: Runner) -> None:
    job = jobs.submit("probe", {})
    assert jobs.cancel(job.id).state is JobState.CANCELLED
    start_runner()
    other = jobs.wait(jobs.submit("probe", {"steps": 1}).id, 30)
    assert other.state is JobState.DONE
    assert jobs.get(job.id).started_at is None
    assert jobs.cancel(other.id).state is JobState.DONE, "an ended job is left as it is"


@pytest.mark.usefixtures("database")
def test_a_killed_job_is_interrupted_and_its_records_stay(
    jobs: Jobs, start_runner: Runner, eventually: Callable[..., bool], fault: Any
) -> None:
    start_runner()
    job = jobs.submit("probe", {"steps": 1000, "step_s": 0.05})
    assert eventually(lambda: counted(jobs, job.id) > 2)
    os.kill(jobs.get(job.id).pid or 0, signal.SIGKILL)
    ended = jobs.wait(job.id, 10)
    assert ended.state is JobState.INTERRUPTED
    assert "SIGKILL" in ended.message
    assert ended.partial is not None
    assert ended.partial["counted"] > 2
    fault(
        "SIGKILL of a job's process", fails=f"that job: `{ended.state.value}`, naming the signal; one that can resume is queued again",
        goes_on="all others", afterwards="what it had stored until then",
    )  # fmt: skip


def test_closing_the_runner_ends_its_jobs_in_order(
    jobs: Jobs, start_runner: Callable[..., object], eventually: Callable[..., bool]
) -> None:
    runner = start_runner()
    job = jobs.submit("probe", {"steps": 1000, "step_s": 0.05})
    assert eventually(lambda: counted(jobs, job.id) > 2)
    owner = ProcessId.of(jobs.get(job.id).pid or 0)
    runner.close()  # type: ignore[attr-defined]
    assert jobs.get(job.id).state is JobState.INTERRUPTED
    assert not owner.is_alive()


RUNNER = """
import sys, time
from pathlib import Path
from workbench import settings
from workbench.jobs import JobRunner, Jobs
from workbench.store import open_store
home = Path(sys.argv[1])
with open_store(home) as store:
    JobRunner(Jobs(store, home), settings.load(home_dir=home)).start()
    time.sleep(600)
"""


def test_a_killed_runner_takes_its_jobs_with_it(
    jobs: Jobs, home: Path, eventually: Callable[..., bool]
) -> None:
    job = jobs.submit("probe", {"steps": 1000, "step_s": 0.05})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(home)], env=environment)
    assert eventually(lambda: counted(jobs, job.id) > 2, 60)
    owner = ProcessId.of(jobs.get(job.id).pid or 0)
    assert owner.pid != runner.pid
    runner.kill()
    runner.wait()
    assert eventually(lambda: not owner.is_alive())
    ended = jobs.get(job.id)
    assert (ended.state, ended.message) == (JobState.INTERRUPTED, "Its process was told to stop")
    assert counted(jobs, job.id) > 2


@pytest.mark.usefixtures("database")
def test_a_resumable_job_goes_on_where_it_was(
    jobs: Jobs, store: Store, eventually: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.submit("probe", {"steps": 40, "step_s": 0.02})
    child = subprocess.Popen(
        [sys.executable, "-m", "workbench.jobs", "run", job.id],
        env={**os.environ, "HOME_DIR": str(jobs.home_dir), "PYTHONPATH": str(ROOT)},
    )
    assert eventually(lambda: counted(jobs, job.id) > 2)
    make_resumable(store, job.id)
    child.kill()
    child.wait()
    assert jobs.claims.recover() == [job.id]
    waiting = jobs.get(job.id)
    assert (waiting.state, waiting.pid, waiting.attempts) == (JobState.QUEUED, None, 1)
    with store.begin() as connection:
        connection.execute(table.update().where(table.c.id == job.id).values(kind="probe"))
    done = jobs.run_here(job.id)
    assert done.state is JobState.DONE
    assert done.result is not None
    assert done.result["resumed_at"] == counted_before(waiting.partial)
    assert done.attempts == 2


def counted_before(partial: dict[str, int] | None) -> int:
    assert partial is not None
    return partial["counted"]


def test_a_job_that_kills_its_process_each_time_is_not_resumed_for_ever(jobs: Jobs, store: Store) -> None:
    job = jobs.submit("probe", {})
    make_resumable(store, job.id)
    gone = ProcessId("this", "boot", 1, "0")
    states = []
    for _ in range(3):
        assert jobs.claims.claim(job.id, gone)
        states.append(jobs.claims.give_up(job.id, gone, "Its process ended"))
    assert states == [JobState.QUEUED, JobState.QUEUED, JobState.INTERRUPTED]


def test_a_job_whose_runner_died_is_found_by_the_next(jobs: Jobs, start_runner: Runner) -> None:
    job = jobs.submit("probe", {})
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = ProcessId.of(process.pid)
        assert jobs.claims.claim(job.id, owner)
        assert jobs.claims.recover() == []  # it lives
        process.kill()
    start_runner()
    assert jobs.wait(job.id, 10).state is JobState.INTERRUPTED


def test_a_pid_that_was_given_out_again_is_not_taken_for_the_old_process() -> None:
    mine = ProcessId.of(os.getpid())
    assert mine.is_alive()
    assert ProcessId.parse(str(mine)) == mine
    assert not ProcessId(mine.host, mine.boot, mine.pid, "1").is_alive()
    assert not ProcessId(mine.host, "other boot", mine.pid, mine.started).is_alive()


@pytest.mark.parametrize("end", [JobState.FAILED, JobState.CANCELLED, JobState.INTERRUPTED, JobState.DONE])
def test_what_a_job_submitted_ends_with_it_unless_it_is_done(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, end: JobState
) -> None:
    me = ProcessId.of(os.getpid())
    parent = jobs.submit("probe", {})
    jobs.claims.claim(parent.id, me)
    monkeypatch.setenv("QUIRE_JOB_ID", parent.id)
    waiting, running = jobs.submit("probe", {}), jobs.submit("probe", {})
    monkeypatch.delenv("QUIRE_JOB_ID")
    other = jobs.submit("probe", {})
    assert (waiting.parent_id, other.parent_id) == (parent.id, None)
    jobs.claims.claim(running.id, me)
    if end is JobState.INTERRUPTED:
        jobs.claims.give_up(parent.id, me, "Its process ended")
    else:
        jobs.claims.finish(parent.id, me, end)
    stays = end is JobState.DONE
    assert jobs.get(waiting.id).state is (JobState.QUEUED if stays else JobState.CANCELLED)
    assert jobs.get(running.id).cancel_requested is not stays
    assert jobs.get(other.id).state is JobState.QUEUED


@pytest.mark.usefixtures("database")
def test_two_claims_one_owner(jobs: Jobs) -> None:
    job = jobs.submit("probe", {})
    me = ProcessId.of(os.getpid())
    won: list[bool] = []
    threads = [threading.Thread(target=lambda: won.append(jobs.claims.claim(job.id, me))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]
    with pytest.raises(JobStateError):
        jobs.run_here(job.id)


@pytest.mark.usefixtures("database")
def test_run_here_needs_no_runner(jobs: Jobs) -> None:
    told: list[str] = []
    job = jobs.submit("probe", {"steps": 2, "step_s": 0.0})
    done = jobs.run_here(job.id, on_progress=lambda fraction, message: told.append(message))
    assert (done.state, done.pid) == (JobState.DONE, os.getpid())
    assert told == ["Step 1 of 2", "Step 2 of 2"]
    assert jobs.run("probe", {"steps": 1, "step_s": 0.0}).state is JobState.DONE


def test_ctrl_c_cancels_a_job_that_runs_here(jobs: Jobs) -> None:
    job = jobs.submit("probe", {"steps": 1000, "step_s": 0.01})

    def interrupt(fraction: float, message: str) -> None:
        if message.startswith("Step 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.run_here(job.id, on_progress=interrupt)
    ended = jobs.get(job.id)
    assert (ended.state, ended.partial) == (JobState.CANCELLED, {"counted": 3})


def test_an_untyped_error_is_kept_with_its_type(jobs: Jobs, capfd: pytest.CaptureFixture[str]) -> None:
    def break_it(fraction: float, message: str) -> None:
        raise ZeroDivisionError("of the caller")

    job = jobs.run_here(jobs.submit("probe", {"steps": 1, "step_s": 0.0}).id, on_progress=break_it)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["type"]) == ("unexpected_error", "ZeroDivisionError")
    assert "Traceback" in capfd.readouterr().err


def test_a_full_disk_is_named_as_one_wherever_it_was_met() -> None:
    facts = error_facts(OSError(errno.ENOSPC, "No space left on device", "/x/executed.ipynb"))
    assert (facts["code"], facts["value"], facts["type"]) == ("disk_full", "/x/executed.ipynb", "OSError")
    assert "No space left" in facts["message"]
    assert facts["remedy"]


@pytest.mark.parametrize(
    ("kind", "spec", "device", "error"),
    [
        ("nothing", {}, "shared", UnknownJobKindError),
        ("probe", {"steps": 0}, "shared", JobSpecError),
        ("probe", {"stepz": 1}, "shared", JobSpecError),
        ("probe", [1], "shared", JobSpecError),
        ("probe", {}, "gpu", JobSpecError),
    ],
)
def test_bad_input_is_refused_and_nothing_is_stored(
    jobs: Jobs, kind: str, spec: dict[str, int], device: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        jobs.submit(kind, spec, device=device)  # type: ignore[arg-type]
    assert jobs.list() == []


def test_unknown_job_and_timeout_are_typed(jobs: Jobs) -> None:
    with pytest.raises(UnknownJobError):
        jobs.get("nothing")
    with pytest.raises(JobTimeoutError):
        jobs.wait(jobs.submit("probe", {}).id, 0.1)


@pytest.mark.usefixtures("database")
def test_list_filters_newest_first(jobs: Jobs) -> None:
    ids = [jobs.submit("probe", {"steps": i + 1}).id for i in range(3)]
    jobs.cancel(ids[1])
    assert [job.id for job in jobs.list()] == ids[::-1]
    assert [job.id for job in jobs.list([JobState.CANCELLED])] == [ids[1]]
    assert [job.id for job in jobs.list(limit=1)] == [ids[2]]
    assert jobs.list(kind="benchmark") == []


def test_a_full_disk_fails_the_job_that_cannot_store(jobs: Jobs, store: Store) -> None:
    import sqlalchemy as sa

    job = jobs.submit("probe", {"steps": 1000, "step_s": 0.0})
    told: list[str] = []

    def fill(fraction: float, message: str) -> None:
        told.append(message)
        if len(told) == 3:
            sa.event.listen(store.engine, "begin", full)

    def full(connection: sa.Connection) -> None:
        if len(told) < 6:  # the disk has room again some statements later: the end can be written
            told.append("full")
            raise sa.exc.OperationalError("", None, Exception("database or disk is full"))

    ended = jobs.run_here(job.id, on_progress=fill)
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert ended.error["code"] == StoreFullError.code
    assert ended.partial == {"counted": 3}


@pytest.mark.full
def test_kills_at_random_moments_leave_every_job_ended_and_no_record_lost(
    jobs: Jobs, start_runner: Runner, eventually: Callable[..., bool]
) -> None:
    generator = random.Random(0)
    start_runner()
    for _ in range(30):
        job = jobs.submit("probe", {"steps": 200, "step_s": 0.02})
        assert eventually(lambda job_id=job.id: jobs.get(job_id).state is JobState.RUNNING)
        time.sleep(generator.uniform(0.0, 2.0))
        seen = counted(jobs, job.id)
        pid = jobs.get(job.id).pid
        assert pid not in (None, os.getpid()) or seen == 0
        if pid not in (None, os.getpid()):
            os.kill(pid or 0, signal.SIGKILL)
        else:
            jobs.cancel(job.id)
        ended = jobs.wait(job.id, 20)
        assert ended.state in (JobState.INTERRUPTED, JobState.CANCELLED)
        assert counted(jobs, job.id) >= seen
