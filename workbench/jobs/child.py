"""A job inside its process: heartbeat, the kind's work, and the one way in which it ends.

``python -m workbench.jobs run JOB_ID`` comes here, and so does `Jobs.run_here`.

Boundary: one job. Which job runs when is the runner's.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any

from engine.errors import TypedError
from workbench import exit_codes
from workbench import settings as settings_module
from workbench.access.acting import acting_as
from workbench.access.principal import Principal, Right
from workbench.guard import die_with_parent
from workbench.jobs.context import JobContext
from workbench.jobs.model import (
    Job,
    JobCancelled,
    JobInterrupted,
    JobState,
    error_facts,
    kind_module,
)
from workbench.jobs.process_id import ProcessId
from workbench.jobs.table import PARENT_VARIABLE, Jobs, OnProgress
from workbench.logs import configure_logging
from workbench.store import UNREADABLE, StoreError, open_store, to_json

log = logging.getLogger(__name__)
HEARTBEAT_S = 2.0
_CANCEL_POLL_S = 0.5
_HARD_EXIT_S = 8.0
_FINISH_PATIENCE_S = 30.0


def run_claimed(jobs: Jobs, job_id: str, on_progress: OnProgress | None = None) -> Job:
    """Run a job that this process has claimed; the ended job.

    Raises:
        KeyboardInterrupt: after the job was marked cancelled.
        StoreError: its end could not be written: the job is found interrupted by whoever looks next.
    """
    owner = ProcessId.of(os.getpid())
    settings = settings_module.load(home_dir=jobs.home_dir)
    context = JobContext(jobs, job_id, owner, settings, on_progress)
    stop = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(jobs, context, owner, stop), name="quire-job-heartbeat", daemon=True
    )
    outer = os.environ.get(PARENT_VARIABLE)
    os.environ[PARENT_VARIABLE] = job_id
    watch.start()
    try:
        with acting_as(Principal(f"job {job_id}", frozenset(Right))):
            _run(jobs, jobs.get(job_id), context, owner)
    finally:
        stop.set()
        watch.join(HEARTBEAT_S * 5)
        os.environ.pop(PARENT_VARIABLE)
        if outer is not None:
            os.environ[PARENT_VARIABLE] = outer
    return jobs.get(job_id)


def _run(jobs: Jobs, job: Job, context: JobContext, owner: ProcessId) -> None:
    try:
        context.check_cancelled()
        if UNREADABLE in job.spec:
            raise StoreError(
                f"the spec of job {job.id} is no JSON any more", value=job.spec[UNREADABLE], remedy="Submit it again."
            )  # fmt: skip
        result = to_json(kind_module(job.kind).run(job.spec, context))
        _finish(jobs, job, owner, JobState.DONE, message="Done", result=result)
    except (JobCancelled, KeyboardInterrupt) as error:
        _finish(jobs, job, owner, JobState.CANCELLED, message="Cancelled; what was stored before is kept")
        if isinstance(error, KeyboardInterrupt):
            raise
    except JobInterrupted as error:
        jobs.claims.give_up(job.id, owner, str(error))
    except Exception as error:  # noqa: BLE001  the job's boundary: every cause is kept with the job
        if isinstance(error, TypedError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        _finish(
            # Whatever broke while it was ending is not the story.
            jobs, job, owner, JobState.CANCELLED if context.cancelled else JobState.FAILED,
            message=str(error) or type(error).__name__, error=error_facts(error),
        )  # fmt: skip


def _finish(jobs: Jobs, job: Job, owner: ProcessId, state: JobState, **values: Any) -> None:
    """Write the end. A disk that is full may have room again soon, and the end is worth waiting for."""
    for _ in range(round(_FINISH_PATIENCE_S / _CANCEL_POLL_S)):
        try:
            jobs.claims.finish(job.id, owner, state, **values)
            return
        except StoreError as error:
            log.warning("the end of job %s cannot be stored yet: %s", job.id, error)
            time.sleep(_CANCEL_POLL_S)
    jobs.claims.finish(job.id, owner, state, **values)


def _watch(jobs: Jobs, context: JobContext, owner: ProcessId, stop: threading.Event) -> None:
    """Write the heartbeat, and tell the job when it should end."""
    beats = 0
    while not stop.wait(_CANCEL_POLL_S):
        beats += 1
        try:
            if beats % round(HEARTBEAT_S / _CANCEL_POLL_S) == 0:
                cancel = jobs.claims.heartbeat(context.job_id, owner)
            else:
                cancel = jobs.get(context.job_id).cancel_requested
        except StoreError as error:
            log.warning("no heartbeat: %s", error)
            continue
        if cancel:
            context.request_cancel()


def main(job_id: str, parent_pid: int | None) -> int:
    """The process of one job; the exit code. With a parent, the job is handed over by it and does not outlive it."""
    signal.signal(signal.SIGTERM, _on_term)
    try:
        if parent_pid is not None:
            die_with_parent(parent_pid)
        return _take_and_run(job_id, parent_pid)
    except (
        JobInterrupted
    ) as stop:  # before the job was ours, or after its end: whoever looks next finds what it is
        print(f"quire: {stop}", file=sys.stderr)
        return exit_codes.FAILURE


def _take_and_run(job_id: str, parent_pid: int | None) -> int:
    settings = settings_module.load()
    configure_logging(settings.log_level, settings.log_format)
    with open_store(settings.home_dir) as store:
        jobs = Jobs(store, settings.home_dir)
        me = ProcessId.of(os.getpid())
        if parent_pid is None:
            taken = jobs.claims.claim(job_id, me)
        else:
            taken = jobs.claims.hand_over(job_id, ProcessId.of(parent_pid), me)
        if not taken:
            print(f"quire: job {job_id} is {jobs.get(job_id).state.value}, not ours to run", file=sys.stderr)
            return exit_codes.BAD_INPUT
        job = run_claimed(jobs, job_id)
    return 0 if job.state is JobState.DONE else exit_codes.FAILURE


def _on_term(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: the way out is not interrupted again
    threading.Thread(target=_leave_at_last, name="quire-hard-exit", daemon=True).start()
    raise JobInterrupted("Its process was told to stop")


def _leave_at_last() -> None:
    """Whatever still hangs then does not keep the process, nor what it has started in its group."""
    time.sleep(_HARD_EXIT_S)
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(exit_codes.FAILURE)
