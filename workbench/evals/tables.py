"""A comparison as data frames for notebooks, and as one flat record.

Everything is read from MLflow and computed again from the stored per-example table, by the functions that the job used: what a
notebook shows is what the job recorded, or `recompute` raises.

Boundary: shapes for people. The statistics are `workbench.evals.compare`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.evals.errors import RecordLostError
from workbench.evals.record import load_result, load_table, metrics_from_table, stored_setup
from workbench.evals.report import PairedMetric, PairRow, from_table

if TYPE_CHECKING:
    import pandas as pd

    from workbench.settings import Settings

_FIGURES = ("a", "b", "diff", "low", "high", "n")


@dataclass(frozen=True, slots=True)
class StoredComparison:
    """A comparison as MLflow holds it."""

    run_id: str
    result: Mapping[str, Any]  # what the job gave back
    rows: tuple[PairRow, ...]
    metrics: Mapping[str, PairedMetric]  # computed again from the rows
    slices: tuple[PairedMetric, ...]

    @property
    def primary(self) -> str:
        """The first metric: the one that is to become better."""
        return next(iter(self.metrics))


def recompute(settings: Settings, run_id: str) -> StoredComparison:
    """Read a comparison's rows and compute its figures again.

    Raises:
        RecordLostError: the run holds no comparison, or its rows give other figures than it says.
    """
    result = load_result(settings, run_id)
    table = load_table(settings, run_id)
    metrics, slices = metrics_from_table(table, *stored_setup(settings, run_id))
    for name, metric in metrics.items():
        found, said = metric.to_dict(), result["metrics"].get(name, {})
        differing = [key for key, value in found.items() if said.get(key) != value]
        if differing:
            raise RecordLostError(
                f"run {run_id} says {name}.{differing[0]} = {said.get(differing[0])}, its rows give {found[differing[0]]}",
                value=said.get(differing[0]), limit=found[differing[0]], param="run_id",
            )  # fmt: skip
    return StoredComparison(run_id, result, tuple(from_table(table)), metrics, tuple(slices))


def metric_frame(metrics: Iterable[PairedMetric]) -> pd.DataFrame:
    """One line a metric: both means, the difference with its interval, and whether it is proven."""
    import pandas as pd

    lines = [
        {
            "metric": m.name,
            **({"slice": m.slice} if m.slice else {}),
            **{name: getattr(m, name) for name in _FIGURES},
            "wins": m.wins,
            "losses": m.losses,
            "p": m.p_adjusted,
            "B is": m.outcome,
            "examples needed": m.examples_needed,
        }
        for m in metrics
    ]
    return pd.DataFrame(lines, columns=None if lines else ["metric", *_FIGURES]).set_index("metric")


def slice_frame(comparison: StoredComparison) -> pd.DataFrame:
    """The slices of the primary metric, one line each."""
    return metric_frame(s for s in comparison.slices if s.name == comparison.primary)


def speed_frame(result: Mapping[str, Any]) -> pd.DataFrame:
    """One line a speed metric; empty when speed was not measured."""
    import pandas as pd

    columns = ["unit", "a", "b", "diff", "low", "high", "percent", "percent_low", "percent_high", "n"]
    return pd.DataFrame.from_dict(result.get("speed", {}), orient="index").reindex(columns=columns)


def differing_examples(rows: Iterable[PairRow], metric: str, limit: int = 10) -> pd.DataFrame:
    """Examples that the versions differ on, the greatest difference first."""
    import pandas as pd

    pairs = [(row, pair[1] - pair[0]) for row in rows if (pair := row.pair(metric)) is not None]
    chosen = sorted((p for p in pairs if p[1]), key=lambda p: -abs(p[1]))[:limit]
    return pd.DataFrame(
        [
            {
                "id": row.example_id, "b - a": change, "question": row.question, "expected": row.expected,
                "A": row.output_a, "B": row.output_b,
            }
            for row, change in chosen
        ],
        columns=["id", "b - a", "question", "expected", "A", "B"],
    )  # fmt: skip


def flat_record(stored: StoredComparison) -> dict[str, Any]:
    """The comparison as one level: ``METRIC_a``, ``METRIC_diff``, …, and the verdict."""
    result = stored.result
    flat: dict[str, Any] = {
        "run_id": stored.run_id,
        "version_a": result["a"],
        "version_b": result["b"],
        "dataset": result["dataset"]["name"],
        "num_examples": result["dataset"]["n"],
        "verdict": result.get("verdict"),
        "reasons": [reason["text"] for reason in result.get("reasons", ())],
    }
    for name, metric in stored.metrics.items():
        flat |= {f"{name}_{part}": getattr(metric, part) for part in _FIGURES}
    for name, speed in result.get("speed", {}).items():
        flat |= {f"{name}_{part}": speed[part] for part in _FIGURES}
    return flat
