"""A comparison's result as the page shows it: rows with their intervals and what each proves.

Reads the plain result of a "compare" job; judges nothing itself but which way is better for a figure that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.ui import formats
from workbench.ui.charts import Interval


@dataclass(frozen=True, slots=True)
class MetricRow:
    """A figure of both versions on the same examples. `diff` is B minus A, its limits are those of the interval."""

    name: str  # the metric, or the slice
    metric: str
    a: float | None
    b: float | None
    diff: float | None
    low: float | None
    high: float | None
    n: int | None
    proven: bool
    higher_is_better: bool = True
    is_share: bool = False  # between 0 and 1: shown in per cent
    unit: str = ""
    p_value: float | None = None  # in a slice: after the correction for the number of slices
    wins: int | None = None
    losses: int | None = None
    detectable: float | None = None
    examples_needed: int | None = None

    @property
    def kind(self) -> str:
        """ok (proven better), bad (proven worse), warn (not proven)."""
        if not self.proven or not self.diff:
            return "warn"
        return "ok" if (self.diff > 0) == self.higher_is_better else "bad"

    @property
    def told(self) -> str:
        return {"ok": "✓ better", "bad": "✕ worse", "warn": "? not proven"}[self.kind]


def row_of(found: Mapping[str, Any], name: str = "") -> MetricRow:
    """From the plain form of a paired metric, or of a speed metric (which has a unit and no test of its own)."""
    low, high = found.get("low"), found.get("high")
    excludes_zero = (low is not None and low > 0) or (high is not None and high < 0)
    return MetricRow(
        name=str(found.get("slice") or found.get("name") or name),
        metric=str(found.get("name") or name),
        proven=bool(found.get("proven", excludes_zero)),
        higher_is_better=bool(found.get("higher_is_better", True)),
        is_share=found.get("bound") == 1.0,
        unit=str(found.get("unit") or ""),
        p_value=found.get("p_adjusted", found.get("p_value")),
        **{field: found.get(field) for field in _PLAIN},
    )


_PLAIN = ("a", "b", "diff", "low", "high", "n", "wins", "losses", "detectable", "examples_needed")


def rows_of(found: object) -> list[MetricRow]:
    """From `{name: {…}}` or from a list."""
    if isinstance(found, Mapping):
        return [row_of(value, str(name)) for name, value in found.items() if isinstance(value, Mapping)]
    if isinstance(found, list):
        return [row_of(value) for value in found if isinstance(value, Mapping)]
    return []


def chart_row(row: MetricRow) -> Interval | None:
    """For the interval plot; None without an interval."""
    if row.diff is None or row.low is None or row.high is None:
        return None
    factor = 100 if row.is_share else 1
    told = f"{interval(row)}, n = {formats.count(row.n)}, {row.told}"
    return Interval(row.name, factor * row.diff, factor * row.low, factor * row.high, row.kind, told)


def interval(row: MetricRow) -> str:
    """`+1.8 % [0.6, 3.1]`; shares in percentage points."""
    if not row.is_share:
        return formats.interval(row.diff, row.low, row.high, unit=row.unit)
    diff, low, high = (None if value is None else 100 * value for value in (row.diff, row.low, row.high))
    return formats.interval(diff, low, high, unit="%")


def value(row: MetricRow, which: float | None) -> str:
    if which is None:
        return formats.UNKNOWN
    if row.is_share:
        return f"{formats.significant(100 * which)} %"
    return f"{formats.significant(which)} {row.unit}".strip()
