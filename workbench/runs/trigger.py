"""Triggers: when a schedule is due, computed by APScheduler's triggers — cron, interval, once.

A trigger is kept as plain values (``{"cron": "0 3 * * *"}``, ``{"every_s": 60}``, ``{"at": "2026-12-01T03:00:00+01:00"}``) and made anew
where it is needed; APScheduler's own job store, which pickles, is not used.

Boundary: times. What happens when one comes is ``workbench.runs.schedules``'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from workbench.runs.errors import ScheduleError, SchedulePastError

if TYPE_CHECKING:
    from apscheduler.triggers.base import BaseTrigger

MIN_INTERVAL_S = 1.0
_KINDS = ("cron", "every_s", "at")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat", "sun")  # crontab's numbers: 0 and 7 are Sunday
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?")
_UNIT_S = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


class Trigger:
    """When a schedule is due. `anchor` is when it was made: intervals count from there."""

    def __init__(self, values: Mapping[str, Any], timezone: str, anchor: datetime) -> None:
        self.values = check_trigger(values)
        self._zone = zone(timezone)
        self._anchor = anchor
        self._trigger = _make(self.values, self._zone, anchor)

    def first(self, now: datetime) -> datetime:
        """The first due time after `now`.

        Raises:
            SchedulePastError: the only time is over.
            ScheduleError: it will never come.
        """
        if "at" in self.values:
            at = self._trigger.get_next_fire_time(None, now)
            if at <= now:
                raise SchedulePastError(
                    f"{self.values['at']} is over (now: {now.astimezone(self._zone).isoformat(timespec='seconds')})",
                    value=self.values["at"], limit="a time to come", param="at", remedy="Give a later time.",
                )  # fmt: skip
            return _utc(at)
        found = self._trigger.get_next_fire_time(None, now + timedelta(microseconds=1))
        if found is None:
            raise ScheduleError(
                f"the schedule {self.values} will never be due", value=dict(self.values), param=_kind(self.values),
                remedy="Check day and month.",
            )  # fmt: skip
        return _utc(found)

    def after(self, due: datetime) -> datetime | None:
        """The due time after `due`; None: it was the last."""
        if "at" in self.values:
            return None
        if "every_s" in self.values:
            return due + timedelta(seconds=float(self.values["every_s"]))
        found = self._trigger.get_next_fire_time(due, due + timedelta(microseconds=1))
        return _utc(found) if found is not None else None

    def latest(self, due: datetime, now: datetime) -> tuple[datetime, int]:
        """The newest due time up to `now`, counting from `due`, and how many lie before it."""
        if "every_s" in self.values:
            every = timedelta(seconds=float(self.values["every_s"]))
            skipped = max(0, (now - due) // every)
            return due + skipped * every, skipped
        skipped = 0
        while (following := self.after(due)) is not None and following <= now:
            due, skipped = following, skipped + 1
        return due, skipped


def check_trigger(values: Mapping[str, Any]) -> dict[str, Any]:
    """Exactly one of cron, every_s and at, of the right type. Raises ScheduleError."""
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) != 1 or next(iter(given)) not in _KINDS:
        raise ScheduleError(
            f"a schedule has exactly one of {', '.join(_KINDS)}, got {sorted(given) or 'none'}", value=sorted(given),
            limit=_KINDS, param=next(iter(given), "cron"),
        )  # fmt: skip
    if "every_s" in given:
        seconds = given["every_s"]
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not number or not MIN_INTERVAL_S <= seconds <= 366 * 86400:
            raise ScheduleError(
                f"every_s must be between {MIN_INTERVAL_S:g} s and a year, got {seconds!r}", value=seconds,
                limit=[MIN_INTERVAL_S, 366 * 86400], param="every_s",
            )  # fmt: skip
    elif not isinstance(next(iter(given.values())), str):
        raise ScheduleError(f"{given} is not accepted: a text is needed", value=given, param=_kind(given))
    return given


def zone(name: str) -> tzinfo:
    """The time zone of that name. Raises ScheduleError."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ScheduleError(
            f"there is no time zone {name!r}", value=name, limit="a name like Europe/Berlin or UTC", param="timezone"
        ) from error  # fmt: skip


def local_zone() -> str:
    """The name of this machine's time zone; UTC where it has none."""
    import tzlocal

    try:
        name = tzlocal.get_localzone_name()
        zone(name)
    except (ScheduleError, LookupError, ValueError):
        return "UTC"
    return name or "UTC"


def seconds_of(text: str) -> float:
    """Seconds of a duration such as 90, 90s, 5m, 1h or 1d. Raises ScheduleError."""
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None:
        raise ScheduleError(
            f"{text!r} is no duration", value=text, limit="90, 90s, 5m, 1h, 1d", param="every"
        )
    return float(found[1]) * _UNIT_S[found[2] or ""]


def describe(values: Mapping[str, Any], timezone: str) -> str:
    """The trigger in words."""
    if "every_s" in values:
        seconds = float(values["every_s"])
        for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
            if seconds >= size and seconds % size == 0:
                return f"every {seconds / size:g} {unit}"
        return f"every {seconds:g} s"
    if "at" in values:
        return f"once at {values['at']}"
    return f"cron {values['cron']} ({timezone})"


def _make(values: Mapping[str, Any], zone: tzinfo, anchor: datetime) -> BaseTrigger:
    from apscheduler.triggers.cron import CronTrigger
    from apscheduler.triggers.date import DateTrigger
    from apscheduler.triggers.interval import IntervalTrigger

    try:
        if "every_s" in values:
            every = float(values["every_s"])
            return IntervalTrigger(seconds=every, start_date=anchor + timedelta(seconds=every), timezone=zone)
        if "at" in values:
            at = datetime.fromisoformat(values["at"])
            return DateTrigger(at if at.tzinfo else at.replace(tzinfo=zone), timezone=zone)
        return CronTrigger.from_crontab(_standard_days(values["cron"]), timezone=zone)
    except (ValueError, TypeError, LookupError) as error:
        kind = _kind(values)
        raise ScheduleError(
            f"{kind}={values[kind]!r} cannot be read: {error}", value=values[kind], param=kind,
            limit="minute hour day month weekday" if kind == "cron" else "a time like 2026-12-01T03:00",
        ) from error  # fmt: skip


def _standard_days(expression: str) -> str:
    """Weekday numbers as crontab counts them (0 or 7 is Sunday) by name: APScheduler counts from Monday."""
    fields = expression.split()
    if len(fields) != 5:
        raise ValueError(f"five fields are needed, got {len(fields)}")
    fields[4] = ",".join(_day_names(part) for part in fields[4].split(","))
    return " ".join(fields)


def _day_names(part: str) -> str:
    span, _, step = part.partition("/")
    low, _, high = span.partition("-")
    if not low.isdigit():
        return part
    first, last = int(low), int(high or low)
    if step and not high:
        last = 6
    if last > 7 or first > last:
        raise ValueError(f"weekday {part!r} is not between 0 and 7")
    return ",".join(dict.fromkeys(_DAYS[day] for day in range(first, last + 1, int(step or 1))))


def _kind(values: Mapping[str, Any]) -> str:
    return next((name for name in _KINDS if name in values), "cron")


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)
