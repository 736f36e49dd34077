"""Jobs: the table of jobs — submitted by pages, API and CLI, claimed by one process each, watched by all.

Boundary: rows. Taking a job up and writing its progress is ``workbench.jobs.claims``', its child process
``workbench.jobs.child``'s, the queue's order ``workbench.jobs.runner``'s.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from workbench import settings as settings_module
from workbench.access import audit
from workbench.jobs.claims import Claims, cancel_jobs, job_of
from workbench.jobs.model import (
    DEVICES,
    Device,
    Job,
    JobSpecError,
    JobState,
    JobStateError,
    JobTimeoutError,
    UnknownJobError,
    kind_module,
)
from workbench.jobs.process_id import ProcessId
from workbench.store import Store, to_json, utc_text
from workbench.store import jobs as table

PARENT_VARIABLE = "QUIRE_JOB_ID"  # set in a job's process: what it submits is its child
_POLL_S = 0.2
OnProgress = Callable[[float, str], None]
Listed = list[Job]  # inside Jobs, `list` is a method


class Jobs:
    """The jobs of one HOME_DIR. Thread-safe."""

    def __init__(self, store: Store, home_dir: Path) -> None:
        self.store = store
        self.home_dir = home_dir.absolute()
        self.claims = Claims(store)

    # ── for everyone ────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self, kind: str, spec: Mapping[str, Any], *, title: str = "", device: Device = "shared"
    ) -> Job:
        """Queue a job; the running app, or whoever runs jobs here, takes it up.

        Raises:
            UnknownJobKindError, JobSpecError, and what the kind's own check raises: nothing was stored.
            StoreError: the store cannot take it.
        """
        values = self.prepare(kind, spec, title=title, device=device)
        with self.store.begin() as connection:
            connection.execute(table.insert().values(values))
            audit.write(connection, "start job", values["id"], detail=f"{kind}: {values['title']}")
        return self.get(values["id"])

    def prepare(
        self, kind: str, spec: Mapping[str, Any], *, title: str = "", device: Device = "shared"
    ) -> dict[str, Any]:
        """The checked row of a new job, for a caller that inserts it in a transaction of its own. Raises as `submit`."""
        plain = _plain_spec(kind, spec)
        if device not in DEVICES:
            raise JobSpecError(
                f"device {device!r} is not one of {', '.join(DEVICES)}",
                value=device,
                limit=DEVICES,
                param="device",
            )
        self._check(kind, plain)
        now = datetime.now(UTC)
        job_id = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
        return {
            "id": job_id, "kind": kind, "title": title or kind, "spec": plain, "state": JobState.QUEUED.value,
            "device": device, "parent_id": os.environ.get(PARENT_VARIABLE), "created_at": utc_text(now),
            "log_path": str(self.home_dir / "jobs" / f"{job_id}.log"),
        }  # fmt: skip

    def _check(self, kind: str, spec: dict[str, Any]) -> None:
        module = kind_module(kind)
        check_in = getattr(module, "check_in", None)  # of a kind whose check needs this HOME_DIR
        if check_in is None:
            module.check(spec)
        else:
            check_in(spec, settings_module.load(home_dir=self.home_dir))

    def get(self, job_id: str) -> Job:
        """The job as it is now. Raises UnknownJobError."""
        with self.store.read() as connection:
            row = connection.execute(sa.select(table).where(table.c.id == job_id)).mappings().first()
        if row is None:
            raise UnknownJobError(
                f"there is no job {job_id!r} in {str(self.home_dir)!r}", value=job_id, param="job_id",
                remedy="`Jobs.list` names those that exist.",
            )  # fmt: skip
        return job_of(row)

    def list(
        self, states: Iterable[JobState] | None = None, kind: str | None = None, limit: int = 50
    ) -> Listed:
        """Jobs, newest first."""
        query = sa.select(table).order_by(table.c.created_at.desc(), table.c.id.desc()).limit(limit)
        if states is not None:
            query = query.where(table.c.state.in_([JobState(state).value for state in states]))
        if kind is not None:
            query = query.where(table.c.kind == kind)
        with self.store.read() as connection:
            return [job_of(row) for row in connection.execute(query).mappings()]

    def cancel(self, job_id: str) -> Job:
        """End a job: at once when it waits, soon when it runs; what it stored stays. An ended job is left as it is.

        What a running job had submitted itself ends with it.

        Raises:
            UnknownJobError
        """
        if not (job := self.get(job_id)).ended:
            with self.store.begin() as connection:
                cancel_jobs(connection, table.c.id == job_id, "Cancelled before it began")
                audit.write(connection, "cancel job", job_id, detail=f"{job.kind}: {job.title}")
        return self.get(job_id)

    def wait(self, job_id: str, timeout_s: float | None = None, on_progress: OnProgress | None = None) -> Job:
        """Block until the job has ended; it goes on when the time is up.

        Raises:
            JobTimeoutError, UnknownJobError
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        told: tuple[float, str] | None = None
        polls = 0
        while not (job := self.get(job_id)).ended:
            if on_progress is not None and told != (job.fraction, job.message):
                told = (job.fraction, job.message)
                on_progress(*told)
            if deadline is not None and time.monotonic() >= deadline:
                raise JobTimeoutError(
                    f"job {job_id} did not end within {timeout_s:g} s; it is {job.state.value}", value=job_id,
                    limit=timeout_s, param="timeout_s", remedy="Wait again, or cancel it.",
                )  # fmt: skip
            polls += 1
            if polls % 25 == 0:
                self.claims.recover()  # nobody else may be there to see that its process died
            time.sleep(_POLL_S)
        return job

    def run_here(self, job_id: str, on_progress: OnProgress | None = None) -> Job:
        """Claim the job and run it in this process and thread; the ended job. Ctrl-C cancels it and is raised again.

        Raises:
            JobStateError: somebody else has it, or it has ended.
        """
        from workbench.jobs.child import run_claimed

        if not self.claims.claim(job_id, ProcessId.of(os.getpid())):
            state = self.get(job_id).state.value
            raise JobStateError(f"job {job_id} is {state}, not queued", value=state, limit="queued")
        return run_claimed(self, job_id, on_progress)

    def run(
        self, kind: str, spec: Mapping[str, Any], *, title: str = "", device: Device = "shared",
        on_progress: OnProgress | None = None,
    ) -> Job:  # fmt: skip
        """Submit a job and stay with it to its end: in the running app of this HOME_DIR, or here when there is none.

        For commands: Ctrl-C cancels the job. Raises as `submit`.
        """
        from workbench.run_state import RunState

        job = self.submit(kind, spec, title=title, device=device)
        tell = _only_news(on_progress)
        app = RunState(self.home_dir / "run")
        try:
            while app.read() is not None:
                try:
                    return self.wait(job.id, 5.0, tell)
                except JobTimeoutError:
                    continue
            if self.get(job.id).state is JobState.QUEUED:
                try:
                    return self.run_here(job.id, tell)
                except JobStateError:  # a runner without an app was quicker
                    pass
            return self.wait(job.id, None, tell)
        except KeyboardInterrupt:
            self.cancel(job.id)
            raise


def _only_news(on_progress: OnProgress | None) -> OnProgress | None:
    """`on_progress` without repetitions."""
    if on_progress is None:
        return None
    tell, told = on_progress, [(-1.0, "")]

    def hear(fraction: float, message: str) -> None:
        if (fraction, message) != told[0]:
            told[0] = (fraction, message)
            tell(fraction, message)

    return hear


def _plain_spec(kind: str, spec: Any) -> dict[str, Any]:
    if not isinstance(spec, Mapping):
        raise JobSpecError(
            f"the spec of a {kind} job must be an object, got {type(spec).__name__}",
            value=type(spec).__name__,
            limit="object",
            param="spec",
        )
    plain: dict[str, Any] = json.loads(json.dumps(to_json(spec)))
    return plain
