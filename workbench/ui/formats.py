"""Numbers as the pages show them: three significant digits, "–" for unknown. Units stand in headers, not here."""

from __future__ import annotations

import math
from datetime import UTC, datetime

UNKNOWN = "–"
GIB = 2**30


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with so many significant digits, without an exponent: 0.0123, 1.23, 123, 12300."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{decimals}f}" if abs(value) < 10**digits else f"{value:,.0f}"


def milliseconds(value: float | None) -> str:
    return UNKNOWN if value is None else f"{significant(value)} ms"


def count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def bytes_of(value: int | None) -> str:
    """GiB, or MiB below one."""
    if value is None:
        return UNKNOWN
    if value < GIB:
        return f"{significant(value / 2**20)} MiB"
    return f"{significant(value / GIB)} GiB"


def rate(value: float, unit: str) -> str:
    """So many a second in the largest of T, G and M that fits: `10.1 GB/s`, `790 TFLOP/s`."""
    for size, prefix in ((1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{significant(value / size)} {prefix}{unit}/s"
    return f"{significant(value / 1e6)} M{unit}/s"


def percent(part: float, whole: float) -> str:
    return UNKNOWN if whole <= 0 else f"{significant(100 * part / whole)} %"


def ago(now_ns: int, then_ns: int) -> str:
    """How long ago, in the largest unit that fits."""
    return duration((now_ns - then_ns) // 1_000_000_000)


def duration(seconds: float | None) -> str:
    """Whole seconds, minutes, hours or days: the largest unit that fits."""
    if seconds is None:
        return UNKNOWN
    whole = max(0, int(seconds))
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if whole >= size:
            return f"{whole // size} {unit}"
    return f"{whole} s"


def signed(value: float | None, digits: int = 3) -> str:
    """With its sign, also a plus; a true minus sign."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    return f"{'+' if value > 0 else '−'}{significant(abs(value), digits)}"


def interval(value: float | None, low: float | None, high: float | None, unit: str = "") -> str:
    """A difference with its interval: `+1.8 % [0.6, 3.1]`."""
    if value is None:
        return UNKNOWN
    shown = f"{signed(value)}{f' {unit}' if unit else ''}"
    return f"{shown} [{_minus(low)}, {_minus(high)}]"


def _minus(value: float | None) -> str:
    """With a true minus sign where there is one."""
    return signed(value).removeprefix("+")


def parse_time(iso: str | None) -> datetime | None:
    """A moment from UTC ISO 8601; None for what is none."""
    try:
        moment = datetime.fromisoformat(iso or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def since(iso: str | None, now: datetime | None = None) -> str:
    """How long ago a UTC moment was: `3 min ago`; in the future `in 3 min`."""
    moment = parse_time(iso)
    if moment is None:
        return UNKNOWN
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    return f"in {duration(-seconds)}" if seconds < -1 else f"{duration(seconds)} ago"


def at_minute(iso: str | None) -> str:
    """A UTC moment to the minute: `2026-11-20 17:40`."""
    found = parse_time(iso)
    return UNKNOWN if found is None else found.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
