"""Figures of two versions side by side, each difference with its paired interval and whether it is proven."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.ui import comparison, formats, markup
from workbench.ui.comparison import MetricRow
from workbench.ui.markup import Cell, term


def as_html(rows: Sequence[MetricRow], what: str = "figure") -> str:
    """The table; empty without rows."""
    if not rows:
        return ""
    with_test = any(row.p_value is not None for row in rows)
    with_wins = any(row.wins is not None for row in rows)
    head = [
        markup.text(what), "", "A", "B", term("paired interval", "B − A, 95 % interval"), "n",
        *(["B wins : loses"] if with_wins else []),
        *([term("p-value", "p")] if with_test else []),
        *([term("detectable effect", "detectable"), term("examples needed", "needed")] if with_wins else []),
    ]  # fmt: skip
    return markup.table(head, (_row(row, with_test, with_wins) for row in rows), left=2)


def _row(row: MetricRow, with_test: bool, with_wins: bool) -> list[Cell]:
    cells = [
        Cell(row.name),
        Cell(row.told, row.kind),
        Cell(comparison.value(row, row.a)),
        Cell(comparison.value(row, row.b)),
        Cell(comparison.interval(row)),
        Cell(formats.count(row.n)),
    ]
    if with_wins:
        cells.append(Cell(f"{formats.count(row.wins)} : {formats.count(row.losses)}"))
    if with_test:
        cells.append(Cell(formats.UNKNOWN if row.p_value is None else _p(row.p_value)))
    if with_wins:
        cells.append(Cell(comparison.value(row, row.detectable)))
        cells.append(Cell(formats.UNKNOWN if row.proven else formats.count(row.examples_needed)))
    return cells


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
