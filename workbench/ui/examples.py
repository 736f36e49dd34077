"""The examples of a comparison: who won each, and which of them to look at.

Read from the per-example table that the comparison logged; no Streamlit here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from workbench.evals.report import PairRow
    from workbench.ui.resources import PageServices

Outcome = Literal["win", "loss", "tie"]
OUTCOMES: tuple[Outcome, ...] = ("win", "loss", "tie")


@dataclass(frozen=True, slots=True)
class Judged:
    """One example under one metric."""

    row: PairRow
    score_a: float | None
    score_b: float | None
    outcome: Outcome  # B's; an example that was not scored for both is a tie


def judge(rows: Sequence[PairRow], metric: str, higher_is_better: bool = True) -> list[Judged]:
    """Every example with its scores of `metric` and who won it."""
    return [_judged(row, metric, higher_is_better) for row in rows]


def _judged(row: PairRow, metric: str, higher_is_better: bool) -> Judged:
    a, b = row.scores_a.get(metric), row.scores_b.get(metric)
    if a is None or b is None or a == b:
        return Judged(row, a, b, "tie")
    return Judged(row, a, b, "win" if (b > a) == higher_is_better else "loss")


def counts(judged: Sequence[Judged]) -> dict[Outcome, int]:
    return {outcome: sum(each.outcome == outcome for each in judged) for outcome in OUTCOMES}


def chosen(judged: Sequence[Judged], outcome: Outcome | None, tag: str | None) -> list[Judged]:
    """Those of one outcome and one slice (`tag=value`); None keeps all."""
    return [
        each
        for each in judged
        if (outcome is None or each.outcome == outcome) and (tag is None or tag in slices_of(each.row))
    ]


def slices_of(row: PairRow) -> list[str]:
    return [f"{name}={value}" for name, value in row.tags.items()]


def load(services: PageServices, result: Mapping[str, Any]) -> list[PairRow]:
    """The rows of a comparison's logged table. Slow: it asks MLflow. Raises RecordLostError, RegistryUnreachableError."""
    from workbench.evals.record import load_table
    from workbench.evals.report import from_table

    run_id = result.get("run_id")
    return from_table(load_table(services.settings, str(run_id))) if run_id else []
