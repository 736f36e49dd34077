"""Schedules: notebooks that run by themselves, and what became of each time they were due.

Firing is one transaction: the occurrence (its id is the schedule's and the due time, so it exists once), its job and the next
due time are written together or not at all. A scheduler that is killed at any moment therefore neither loses nor doubles an
occurrence, and two schedulers do no harm.

Missed times (nobody ran): the newest of them still runs if it is not later than the schedule's grace, and stands for the earlier
ones. An occurrence whose predecessor still runs is skipped and written down.

Boundary: tables and times. The loop is ``workbench.runs.scheduler``'s, the run itself a job.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from workbench.access import audit
from workbench.errors import WorkbenchError
from workbench.jobs.model import JobState
from workbench.jobs.table import Jobs
from workbench.runs.errors import ScheduleError, UnknownScheduleError
from workbench.runs.trigger import Trigger, check_trigger, describe, local_zone
from workbench.store import Store, schedule_occurrences, to_json, utc_text
from workbench.store import jobs as jobs_table
from workbench.store import schedules as table

DEFAULT_GRACE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """One schedule. Times are UTC, ISO 8601."""

    id: str
    name: str
    notebook: str
    parameters: dict[str, Any]
    trigger: dict[str, Any]
    timezone: str
    grace_s: float
    enabled: bool
    created_at: str
    next_due_at: str | None  # None: it will not fire again

    @property
    def when(self) -> str:
        """The trigger in words."""
        return describe(self.trigger, self.timezone)


@dataclass(frozen=True, slots=True)
class Occurrence:
    """What became of one due time; `job_state` as it is now."""

    id: str
    schedule_id: str
    schedule_name: str
    due_at: str
    decided_at: str
    outcome: str  # fired | missed (too late) | overlap (the one before still ran) | refused (it cannot run)
    coalesced: int  # earlier due times that this one stands for
    job_id: str | None
    reason: str
    job_state: JobState | None


Listed = list[Schedule]  # inside Schedules, `list` is a method
Occurrences = list[Occurrence]


class Schedules:
    """The schedules of one HOME_DIR. Thread-safe."""

    def __init__(self, store: Store, home_dir: Path) -> None:
        self.store = store
        self._jobs = Jobs(store, home_dir)

    def add(
        self,
        name: str,
        notebook: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        cron: str | None = None,
        every_s: float | None = None,
        at: str | None = None,
        timezone: str | None = None,
        grace_s: float = DEFAULT_GRACE_S,
        now: datetime | None = None,
    ) -> Schedule:
        """Run `notebook` with `parameters` by a cron expression, every so many seconds, or once.

        Raises:
            ScheduleError, SchedulePastError: the trigger cannot hold, or the name is taken.
            UnknownNotebookError, NotebookFormatError, NotebookParameterError: it could not run.
            StoreError
        """
        moment = now or datetime.now(UTC)
        if not name.strip() or len(name) > 100:
            raise ScheduleError(
                f"a schedule needs a name of 1 to 100 characters, got {name!r}", value=name, param="name"
            )
        if not isinstance(grace_s, int | float) or isinstance(grace_s, bool) or grace_s < 0:
            raise ScheduleError(
                f"grace_s must be at least 0, got {grace_s!r}", value=grace_s, limit=0, param="grace_s"
            )
        values = check_trigger({"cron": cron, "every_s": every_s, "at": at})
        zone_name = timezone or local_zone()
        due = Trigger(values, zone_name, moment).first(moment)
        spec = {"notebook": notebook, "parameters": to_json(dict(parameters or {}))}
        self._jobs.prepare("notebook", spec)
        row = {
            "id": secrets.token_hex(6), "name": name.strip(), "notebook": notebook, "parameters": spec["parameters"],
            "trigger": values, "timezone": zone_name, "grace_s": float(grace_s), "enabled": True,
            "created_at": utc_text(moment), "next_due_at": utc_text(due),
        }  # fmt: skip
        try:
            with self.store.begin() as connection:
                connection.execute(table.insert().values(row))
                audit.write(connection, "add schedule", row["name"], detail=notebook)
        except sa.exc.IntegrityError:
            raise ScheduleError(
                f"there is a schedule {name.strip()!r} already", value=name, param="name",
                remedy="Give another name, or remove that one.",
            ) from None  # fmt: skip
        return Schedule(**row)

    def list(self) -> Listed:
        """All schedules, the next due first."""
        query = sa.select(table).order_by(table.c.next_due_at.is_(None), table.c.next_due_at, table.c.name)
        with self.store.read() as connection:
            return [Schedule(**row) for row in connection.execute(query).mappings()]

    def get(self, name: str) -> Schedule:
        """The schedule of that name or id. Raises UnknownScheduleError."""
        with self.store.read() as connection:
            row = connection.execute(sa.select(table).where(_is(name))).mappings().first()
        if row is None:
            known = [each.name for each in self.list()]
            raise UnknownScheduleError(
                f"there is no schedule {name!r}", value=name, limit=known, param="name",
                remedy=f"Schedules: {', '.join(known) or 'none'}.",
            )  # fmt: skip
        return Schedule(**row)

    def remove(self, name: str) -> Schedule:
        """Take the schedule away; its history and a job that runs stay. Raises UnknownScheduleError."""
        found = self.get(name)
        with self.store.begin() as connection:
            connection.execute(table.delete().where(table.c.id == found.id))
            audit.write(connection, "remove schedule", found.name)
        return found

    def enable(self, name: str, enabled: bool = True, *, now: datetime | None = None) -> Schedule:
        """Go on, or pause. What was due meanwhile is not made up for.

        Raises:
            UnknownScheduleError
            SchedulePastError: its only time is over.
        """
        found = self.get(name)
        values: dict[str, Any] = {"enabled": enabled}
        if enabled and not found.enabled:
            values["next_due_at"] = utc_text(self._trigger(found).first(now or datetime.now(UTC)))
        with self.store.begin() as connection:
            connection.execute(table.update().where(table.c.id == found.id).values(**values))
            audit.write(connection, "resume schedule" if enabled else "pause schedule", found.name)
        return self.get(found.id)

    def history(self, name: str | None = None, limit: int = 50) -> Occurrences:
        """What became of due times, newest first; also of schedules that are gone."""
        occurrence = schedule_occurrences.c
        query = (
            sa.select(schedule_occurrences, jobs_table.c.state.label("job_state"))
            .outerjoin(jobs_table, jobs_table.c.id == occurrence.job_id)
            .order_by(occurrence.decided_at.desc(), occurrence.id.desc())
            .limit(limit)
        )
        if name is not None:
            query = query.where(sa.or_(occurrence.schedule_name == name, occurrence.schedule_id == name))
        with self.store.read() as connection:
            rows = connection.execute(query).mappings().all()
        return [_occurrence(row) for row in rows]

    def next_due(self) -> datetime | None:
        """When the next schedule is due; None when none is."""
        query = sa.select(sa.func.min(table.c.next_due_at)).where(table.c.enabled.is_(True))
        with self.store.read() as connection:
            found = connection.execute(query).scalar()
        return datetime.fromisoformat(found) if found else None

    def fire_due(self, now: datetime | None = None) -> Occurrences:
        """Decide about everything that is due: submit its jobs, write down what happened, set the next time."""
        moment = now or datetime.now(UTC)
        due = sa.select(table.c.id).where(table.c.enabled.is_(True), table.c.next_due_at <= utc_text(moment))
        with self.store.read() as connection:
            ids = connection.execute(due).scalars().all()
        if ids:
            self._jobs.claims.recover()  # a job whose process is gone must not count as still running
        return [found for each in ids if (found := self._fire(each, moment)) is not None]

    def _fire(self, schedule_id: str, now: datetime) -> Occurrence | None:
        with self.store.begin() as connection:
            row = connection.execute(sa.select(table).where(table.c.id == schedule_id)).mappings().first()
            if row is None or not row["enabled"] or not row["next_due_at"]:
                return None
            schedule = Schedule(**row)
            first = datetime.fromisoformat(row["next_due_at"])
            if first > now:  # another scheduler was here
                return None
            trigger = self._trigger(schedule)
            due, coalesced = trigger.latest(first, now)
            values: dict[str, Any] = {
                "id": f"{schedule.id}@{utc_text(due)}", "schedule_id": schedule.id, "schedule_name": schedule.name,
                "due_at": utc_text(due), "decided_at": utc_text(now), "coalesced": coalesced, "job_id": None,
                "reason": "",
            }  # fmt: skip
            values |= self._decide(connection, schedule, due, now)
            connection.execute(schedule_occurrences.insert().values(values))
            following = trigger.after(due)
            connection.execute(
                table.update()
                .where(table.c.id == schedule.id)
                .values(next_due_at=utc_text(following) if following else None)
            )
        state = JobState.QUEUED if values["job_id"] else None
        return Occurrence(**values, job_state=state)

    def _decide(
        self, connection: sa.Connection, schedule: Schedule, due: datetime, now: datetime
    ) -> dict[str, Any]:
        late = now - due
        if late > timedelta(seconds=schedule.grace_s):
            return {
                "outcome": "missed",
                "reason": f"{late.total_seconds():.0f} s late, the grace is {schedule.grace_s:g} s",
            }
        still = _open_job(connection, schedule.id)
        if still is not None:
            return {"outcome": "overlap", "reason": f"job {still} of the time before has not ended"}
        spec = {"notebook": schedule.notebook, "parameters": schedule.parameters}
        try:
            job = self._jobs.prepare("notebook", spec, title=f"{schedule.name}: {schedule.notebook}")
        except WorkbenchError as error:
            return {"outcome": "refused", "reason": str(error)}
        job["parent_id"] = None
        connection.execute(jobs_table.insert().values(job))
        return {"outcome": "fired", "job_id": job["id"]}

    def _trigger(self, schedule: Schedule) -> Trigger:
        anchor = datetime.fromisoformat(schedule.created_at)
        return Trigger(schedule.trigger, schedule.timezone, anchor)


def _open_job(connection: sa.Connection, schedule_id: str) -> str | None:
    """The job of an earlier occurrence that has not ended."""
    states = [JobState.QUEUED.value, JobState.RUNNING.value]
    query = (
        sa.select(jobs_table.c.id)
        .join(schedule_occurrences, schedule_occurrences.c.job_id == jobs_table.c.id)
        .where(schedule_occurrences.c.schedule_id == schedule_id, jobs_table.c.state.in_(states))
        .limit(1)
    )
    found: str | None = connection.execute(query).scalar()
    return found


def _is(name: str) -> sa.ColumnElement[bool]:
    return sa.or_(table.c.name == name, table.c.id == name)


def _occurrence(row: sa.RowMapping) -> Occurrence:
    state = row["job_state"]
    return Occurrence(**{**row, "job_state": JobState(state) if state else None})
