"""Numbers as the pages show them: three significant digits, "–" for unknown. Units stand in headers, not here."""

from __future__ import annotations

import math

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


def percent(part: float, whole: float) -> str:
    return UNKNOWN if whole <= 0 else f"{significant(100 * part / whole)} %"


def ago(now_ns: int, then_ns: int) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0, (now_ns - then_ns) // 1_000_000_000)
    if seconds < 60:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 3600 else f"{seconds // 3600} h"
