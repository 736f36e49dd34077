"""A comparison as its job leaves it: rows whose outcome is known, real statistics, a real verdict, a real MLflow run."""

from __future__ import annotations

import json
from typing import Any

from workbench.evals.compare import Statistics, compare_rows
from workbench.evals.gate import decide, fitting_rules
from workbench.evals.record import save_comparison
from workbench.evals.report import Comparison, PairRow
from workbench.evals.scorers import Metric
from workbench.settings import Settings

EXACT = Metric("exact_match")


def pair_rows(n: int = 60, wins: int = 20, losses: int = 2) -> list[PairRow]:
    """`wins` examples that only B gets right, `losses` that only A does, and the rest that both do; two slices."""
    rows = []
    for place in range(n):
        a, b = place >= wins, place < wins or place >= wins + losses
        expected = json.dumps({"product": f"P-{place}", "urgent": place % 2 == 0})
        wrong = json.dumps({"product": "P-?", "urgent": place % 2 == 0})
        rows.append(
            PairRow(
                f"t-{place:03}", f"Message {place} about <b>P-{place}</b>", expected, {"slice": "urgent" if place % 2 else "calm"},
                expected if a else wrong, expected if b else wrong, 12, 12,
                {"exact_match": float(a)}, {"exact_match": float(b)},
            )
        )  # fmt: skip
    return rows


def compare_result(settings: Settings, a: str, b: str, rows: list[PairRow]) -> dict[str, Any]:
    """The result of a "compare" job over these rows, recorded in MLflow."""
    statistics = Statistics(resamples=500)
    metrics, slices = compare_rows(rows, [EXACT], statistics)
    comparison = Comparison(
        a, b, "ticket-extractor", "d" * 64, metrics, tuple(slices), tuple(rows), statistics.confidence,
        statistics.resamples, statistics.seed,
    )  # fmt: skip
    decision = decide(fitting_rules([EXACT], has_slices=True, speed=False), comparison)
    run_id = save_comparison(comparison, settings, decision=decision)
    return {
        **comparison.to_dict(),
        **decision.to_dict(),
        "run_id": run_id,
        "runs": {},
        "rows_saved": comparison.n,
    }
