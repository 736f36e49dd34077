"""Claims: the side of the jobs' table that belongs to who runs them: take, hand over, report, end, give up, recover.

A claim is one UPDATE with a condition, so that two processes never run the same job. A job belongs to the process that is
written beside it, and only that process's writes count; when it is gone, `recover` marks the job interrupted, or queues it
again where its kind can resume.

Boundary: rows. Processes are ``workbench.jobs.runner``'s and ``workbench.jobs.child``'s.
"""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

from workbench.jobs.model import MAX_ATTEMPTS, RESUMABLE, Job, JobState
from workbench.jobs.process_id import ProcessId
from workbench.store import Store, utc_now
from workbench.store import jobs as table

_FOREIGN_SILENCE_S = (
    60.0  # a job of another machine counts as dead when no heartbeat came for so long while we looked
)


class Claims:
    """The jobs of one store, for their runners. Thread-safe."""

    def __init__(self, store: Store, *, foreign_silence_s: float = _FOREIGN_SILENCE_S) -> None:
        self.store = store
        self._foreign_silence_s = foreign_silence_s
        # By job of another machine: its last heartbeat, and when we saw it first. Their clock may be hours from ours.
        self._heartbeats: dict[str, tuple[str, float]] = {}

    def claim(self, job_id: str, owner: ProcessId) -> bool:
        """Take a queued job for a process; False when it is not queued any more."""
        now = utc_now()
        with self.store.begin() as connection:
            done = connection.execute(
                table.update()
                .where(table.c.id == job_id, table.c.state == JobState.QUEUED.value)
                .values(
                    state=JobState.RUNNING.value, pid=owner.pid, process=str(owner), started_at=now, heartbeat_at=now,
                    attempts=table.c.attempts + 1, message="Starting", fraction=0.0, error=None,
                )
            )  # fmt: skip
            return done.rowcount == 1

    def hand_over(self, job_id: str, giver: ProcessId, taker: ProcessId) -> bool:
        """Move a claimed job from the runner to its child; False when the runner does not have it any more."""
        return self._update(job_id, giver, pid=taker.pid, process=str(taker), heartbeat_at=utc_now())

    def progress(self, job_id: str, owner: ProcessId, fraction: float, message: str) -> bool:
        return self._update(
            job_id, owner, fraction=min(max(fraction, 0.0), 1.0), message=message, heartbeat_at=utc_now()
        )

    def store_partial(self, job_id: str, owner: ProcessId, partial: dict[str, Any]) -> bool:
        return self._update(job_id, owner, partial=partial)

    def heartbeat(self, job_id: str, owner: ProcessId) -> bool:
        """Say that it lives; True when somebody asked it to end."""
        self._update(job_id, owner, heartbeat_at=utc_now())
        wanted = sa.select(table.c.cancel_requested).where(table.c.id == job_id)
        with self.store.read() as connection:
            return bool(connection.execute(wanted).scalar())

    def finish(
        self, job_id: str, owner: ProcessId, state: JobState, *, message: str = "",
        result: dict[str, Any] | None = None, error: dict[str, Any] | None = None,
    ) -> bool:  # fmt: skip
        """Write the end of a job, once: False when it is not `owner`'s any more or had ended.

        What it had submitted and not waited for goes on after DONE; otherwise it is cancelled with it.
        """
        values: dict[str, Any] = {
            "state": state.value,
            "ended_at": utc_now(),
            "result": result,
            "error": error,
        }
        if message:
            values["message"] = message
        if state is JobState.DONE:
            values["fraction"] = 1.0
        with self.store.begin() as connection:
            done = _write(connection, job_id, owner, values)
            if done and state is not JobState.DONE:
                _cancel_children(connection, job_id)
        return done

    def give_up(self, job_id: str, owner: ProcessId, message: str) -> JobState:
        """The job's process ended without a word, or is told to stop: queued again where it can resume, else interrupted.

        Returns the job's state afterwards.
        """
        with self.store.begin() as connection:
            row = connection.execute(sa.select(table).where(table.c.id == job_id)).mappings().first()
            if row is None or row["process"] != str(owner) or row["state"] != JobState.RUNNING.value:
                return JobState(row["state"]) if row is not None else JobState.INTERRUPTED
            return _orphan(connection, row, message)

    def recover(self) -> list[str]:
        """Look at all running jobs; those whose process is gone are queued again or marked interrupted. Their ids."""
        running = table.c.state == JobState.RUNNING.value
        with self.store.read() as connection:
            rows = connection.execute(sa.select(table).where(running)).mappings().all()
        gone = [row["id"] for row in rows if self._is_gone(row)]
        if not gone:
            return []
        with self.store.begin() as connection:  # looked at again: the first look held no lock
            rows = connection.execute(sa.select(table).where(running, table.c.id.in_(gone))).mappings().all()
            lost = [row for row in rows if self._is_gone(row)]
            for row in lost:
                _orphan(connection, row, "Its process ended before it did")
        return [row["id"] for row in lost]

    def open_jobs(self) -> list[Job]:
        """Queued and running jobs, in the order in which they were submitted."""
        states = [JobState.QUEUED.value, JobState.RUNNING.value]
        query = sa.select(table).where(table.c.state.in_(states)).order_by(table.c.created_at, table.c.id)
        with self.store.read() as connection:
            return [job_of(row) for row in connection.execute(query).mappings()]

    def _is_gone(self, row: sa.RowMapping) -> bool:
        owner = ProcessId.parse(row["process"])
        if owner.is_local:
            return not owner.is_alive()
        now = time.monotonic()
        heartbeat, since = self._heartbeats.get(row["id"], ("", now))
        if heartbeat != row["heartbeat_at"]:
            self._heartbeats[row["id"]] = (row["heartbeat_at"], now)
            return False
        return now - since > self._foreign_silence_s

    def _update(self, job_id: str, owner: ProcessId, **values: Any) -> bool:
        with self.store.begin() as connection:
            return _write(connection, job_id, owner, values)


def _write(connection: sa.Connection, job_id: str, owner: ProcessId, values: dict[str, Any]) -> bool:
    """Change a running job's row if it is `owner`'s."""
    its_own = (table.c.id == job_id, table.c.process == str(owner), table.c.state == JobState.RUNNING.value)
    return connection.execute(table.update().where(*its_own).values(**values)).rowcount == 1


def cancel_jobs(connection: sa.Connection, which: sa.ColumnElement[bool], message: str) -> None:
    """Cancel jobs: at once those that wait, soon those that run."""
    ended = {"state": JobState.CANCELLED.value, "ended_at": utc_now(), "message": message}
    waiting, running = table.c.state == JobState.QUEUED.value, table.c.state == JobState.RUNNING.value
    connection.execute(table.update().where(which, waiting).values(cancel_requested=True, **ended))
    connection.execute(table.update().where(which, running).values(cancel_requested=True))


def _cancel_children(connection: sa.Connection, parent_id: str) -> None:
    cancel_jobs(connection, table.c.parent_id == parent_id, "Cancelled: the job that wanted it has ended")


def _orphan(connection: sa.Connection, row: sa.RowMapping, message: str) -> JobState:
    resumes = row["kind"] in RESUMABLE and row["attempts"] < MAX_ATTEMPTS and not row["cancel_requested"]
    values: dict[str, Any]
    if resumes:
        state, values = JobState.QUEUED, {"message": f"{message}; it will be resumed"}
    else:
        state = JobState.CANCELLED if row["cancel_requested"] else JobState.INTERRUPTED
        values = {"message": message, "ended_at": utc_now()}
    values |= {"state": state.value, "pid": None, "process": None}
    connection.execute(table.update().where(table.c.id == row["id"]).values(**values))
    _cancel_children(connection, row["id"])
    return state


def job_of(row: sa.RowMapping) -> Job:
    return Job(**{name: row[name] for name in _FIELDS} | {"state": JobState(row["state"])})


_FIELDS = tuple(Job.__dataclass_fields__)
