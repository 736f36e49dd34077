"""JobRunner: takes queued jobs up in their order and runs each in a child process of its own.

One thread looks at the table twice a second. An `exclusive` job waits until nothing else uses the device and keeps others from
starting meanwhile; jobs that a running job submitted, and such that need no device, never wait for it. A child that ends
without a word is written down as interrupted; one that does not heed a cancel is ended.

Boundary: processes. The rows are ``workbench.jobs.table``'s.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.jobs.environment import child_environment
from workbench.jobs.model import Job, JobState
from workbench.jobs.process_id import ProcessId
from workbench.jobs.table import Jobs
from workbench.settings import Settings
from workbench.store import StoreError

log = logging.getLogger(__name__)
MAX_PARALLEL = 3  # jobs with a device at once; their children come on top
_POLL_S = 0.5
_RECOVER_EVERY = 10  # polls
_CANCEL_GRACE_S = 10.0  # a job may finish the piece of work it is at
_TERM_GRACE_S = 4.0


@dataclass(slots=True)
class _Child:
    job_id: str
    process: subprocess.Popen[bytes]
    id: ProcessId
    cancel_seen_at: float | None = None
    told: bool = False  # SIGTERM was sent

    def signal(self, sig: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, sig)
        except (ProcessLookupError, PermissionError):
            pass


class JobRunner:
    """Runs the jobs of one HOME_DIR. Not more than one is needed; several do no harm, each job is claimed once."""

    def __init__(self, jobs: Jobs, settings: Settings, *, max_parallel: int = MAX_PARALLEL) -> None:
        self._jobs = jobs
        self._settings = settings
        self._max_parallel = max_parallel
        self._me = ProcessId.of(os.getpid())
        self._children: dict[str, _Child] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._store_failed = False

    def start(self) -> None:
        """Begin, with the jobs that an earlier process left behind. A second call does nothing."""
        if self._thread is None:
            # The children are told to end when this very thread does (the kernel counts threads as parents).
            self._thread = threading.Thread(target=self._run, name="quire-jobs", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the running jobs: they are marked, their records kept. Takes up to five seconds."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_TERM_GRACE_S + 2)

    def _run(self) -> None:
        polls = 0
        while not self._stop.is_set():
            try:
                if polls % _RECOVER_EVERY == 0:
                    self._jobs.claims.recover()
                self._reap()
                self._end_cancelled()
                self._start_next()
                self._store_failed = False
            except StoreError as error:  # a full or busy disk passes; jobs go on meanwhile
                if not self._store_failed:
                    log.warning("jobs wait for the store: %s", error)
                self._store_failed = True
            except Exception:
                log.exception("the job runner met an unexpected error")
            polls += 1
            self._stop.wait(_POLL_S)
        self._end_all()

    # ── order ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _start_next(self) -> None:
        open_jobs = self._jobs.claims.open_jobs()
        for job in startable(open_jobs, self._max_parallel):
            if self._jobs.claims.claim(job.id, self._me):
                self._spawn(job)

    def _spawn(self, job: Job) -> None:
        log_path = Path(job.log_path)
        command = [sys.executable, "-m", "workbench.jobs", "run", job.id, "--parent", str(os.getpid())]
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with log_path.open("ab") as output:
                process = subprocess.Popen(
                    command, env=child_environment(self._settings), stdin=subprocess.DEVNULL,
                    stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            facts = {"code": "job_not_started", "type": type(error).__name__, "message": str(error)}
            self._jobs.claims.finish(
                job.id, self._me, JobState.FAILED, message=f"Its process could not be started: {error}", error=facts
            )  # fmt: skip
            return
        self._children[job.id] = _Child(job.id, process, ProcessId.of(process.pid))

    # ── ends ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _reap(self) -> None:
        for child in [each for each in self._children.values() if each.process.poll() is not None]:
            child.signal(signal.SIGKILL)  # what it left behind in its group
            self._write_down(child)
            del self._children[child.job_id]

    def _write_down(self, child: _Child) -> None:
        how = _how(child.process.returncode)
        for owner in (child.id, self._me):  # it may have ended before the job was handed to it
            self._jobs.claims.give_up(child.job_id, owner, f"Its process ended ({how})")

    def _end_cancelled(self) -> None:
        now = time.monotonic()
        for child in self._children.values():
            if child.cancel_seen_at is None:
                if self._jobs.get(child.job_id).cancel_requested:
                    child.cancel_seen_at = now
            elif now - child.cancel_seen_at > _CANCEL_GRACE_S + _TERM_GRACE_S:
                child.signal(signal.SIGKILL)
            elif now - child.cancel_seen_at > _CANCEL_GRACE_S and not child.told:
                child.told = True
                child.signal(signal.SIGTERM)

    def _end_all(self) -> None:
        for child in self._children.values():
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + _TERM_GRACE_S
        for child in self._children.values():
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            child.signal(signal.SIGKILL)
            child.process.wait()
            try:
                self._write_down(child)
            except StoreError as error:
                log.warning("job %s will be found interrupted by the next start: %s", child.job_id, error)
        self._children.clear()


def startable(open_jobs: Sequence[Job], max_parallel: int) -> list[Job]:
    """Which of the queued jobs may start now, given all that are queued or running, oldest first.

    Nothing overtakes a waiting exclusive job, so that it is not put off for ever.
    """
    running = [job for job in open_jobs if job.state is JobState.RUNNING]
    ids = {job.id for job in running}
    busy = [job for job in running if job.device != "none" and job.parent_id not in ids]
    alone = any(job.device == "exclusive" for job in running)
    starts: list[Job] = []
    blocked = alone
    for job in open_jobs:
        if job.state is not JobState.QUEUED:
            continue
        if job.device == "none" or job.parent_id in ids:
            starts.append(job)  # its parent waits for it: it must not wait for its parent
            continue
        if not blocked and job.device == "exclusive":
            blocked = True
            if not busy:
                starts.append(job)
                busy.append(job)
        elif not blocked and len(busy) < max_parallel:
            starts.append(job)
            busy.append(job)
    return starts


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
