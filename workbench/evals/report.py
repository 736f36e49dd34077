"""What a comparison found, as values: per metric, per slice, per example; and as the table from which all of it can be recomputed.

The table has one row an example: ``id``, ``question``, ``expected``, ``tags`` (JSON), ``output_a``, ``output_b``, ``tokens_a``,
``tokens_b``, and ``METRIC_a``, ``METRIC_b`` for each metric (empty where an example was not scored).

Boundary: shapes. The numbers come from `workbench.evals.compare`, the verdict from `workbench.evals.gate`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.evals.divergence import Divergence
from workbench.evals.evaluate import Repeatability
from workbench.evals.speed import SpeedMetric, SpeedRow

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class PairRow:
    """One example with both versions' answers and scores."""

    example_id: str
    question: str
    expected: str
    tags: Mapping[str, str]
    output_a: str
    output_b: str
    num_tokens_a: int
    num_tokens_b: int
    scores_a: Mapping[str, float | None]
    scores_b: Mapping[str, float | None]

    def pair(self, metric: str) -> tuple[float, float] | None:
        """Both scores; None unless both versions were scored."""
        a, b = self.scores_a.get(metric), self.scores_b.get(metric)
        return None if a is None or b is None else (a, b)


@dataclass(frozen=True, slots=True)
class PairedMetric:
    """One metric over the same examples for both versions. `diff` is b - a; low and high are its confidence limits."""

    name: str
    a: float
    b: float
    diff: float
    low: float | None
    high: float | None
    n: int  # examples that both versions were scored on
    wins: int  # examples on which B is better
    losses: int
    ties: int
    p_value: float
    p_adjusted: float  # in a slice: after Holm over the slices of its tag; else the p-value
    proven: bool  # the interval excludes 0 and the (adjusted) p-value is at most 1 - confidence
    higher_is_better: bool
    bound: float | None
    method: str  # of the interval
    detectable: float | None  # the true difference that this many examples would prove with power 0.8
    examples_needed: int | None  # in all, to prove the observed difference with power 0.8
    slice: str | None = None  # "tag=value", or None: all examples

    @property
    def gain(self) -> float:
        """The difference, counted so that more is better."""
        return self.diff if self.higher_is_better else -self.diff

    @property
    def gain_low(self) -> float | None:
        return self.low if self.higher_is_better else None if self.high is None else -self.high

    @property
    def gain_high(self) -> float | None:
        return self.high if self.higher_is_better else None if self.low is None else -self.low

    @property
    def outcome(self) -> str:
        """ "better", "worse" or "not proven": B against A."""
        if not self.proven:
            return "not proven"
        return "better" if self.gain > 0 else "worse"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "outcome": self.outcome}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Version B against version A on one dataset."""

    a: str
    b: str
    dataset: str
    dataset_digest: str
    metrics: Mapping[str, PairedMetric]
    slices: tuple[PairedMetric, ...]
    rows: tuple[PairRow, ...]
    confidence: float
    resamples: int
    seed: int
    speed: Mapping[str, SpeedMetric] = field(default_factory=dict)
    speed_rows: tuple[SpeedRow, ...] = ()
    repeatable: Repeatability | None = None
    divergence: Divergence | None = None  # None: not measured

    @property
    def n(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; without the rows, which are in the table."""
        return {
            "a": self.a,
            "b": self.b,
            "dataset": {"name": self.dataset, "digest": self.dataset_digest, "n": self.n},
            "metrics": {name: metric.to_dict() for name, metric in self.metrics.items()},
            "slices": [metric.to_dict() for metric in self.slices],
            "speed": {name: metric.to_dict() for name, metric in self.speed.items()},
            "confidence": self.confidence,
            "resamples": self.resamples,
            "seed": self.seed,
            "repeatable": None if self.repeatable is None else self.repeatable.to_dict(),
            "divergence": None if self.divergence is None else self.divergence.to_dict(),
        }


def to_table(rows: Sequence[PairRow], metrics: Sequence[str]) -> pd.DataFrame:
    """The rows as a data frame, one column a fact."""
    import pandas as pd

    columns: dict[str, list[Any]] = {
        "id": [row.example_id for row in rows],
        "question": [row.question for row in rows],
        "expected": [row.expected for row in rows],
        "tags": [json.dumps(dict(row.tags), sort_keys=True, ensure_ascii=False) for row in rows],
        "output_a": [row.output_a for row in rows],
        "output_b": [row.output_b for row in rows],
        "tokens_a": [row.num_tokens_a for row in rows],
        "tokens_b": [row.num_tokens_b for row in rows],
    }
    for name in metrics:
        columns[f"{name}_a"] = [row.scores_a.get(name) for row in rows]
        columns[f"{name}_b"] = [row.scores_b.get(name) for row in rows]
    return pd.DataFrame(columns, dtype=object)  # texts as objects: pandas warns MLflow of its own text type


def from_table(table: pd.DataFrame) -> list[PairRow]:
    """The rows of a table that `to_table` made, wherever it was stored in between."""
    names = metric_names(table)
    return [
        PairRow(
            str(row["id"]), str(row["question"]), str(row["expected"]), json.loads(row["tags"]), str(row["output_a"]),
            str(row["output_b"]), int(row["tokens_a"]), int(row["tokens_b"]),
            {name: _score(row[f"{name}_a"]) for name in names}, {name: _score(row[f"{name}_b"]) for name in names},
        )
        for row in table.to_dict("records")
    ]  # fmt: skip


def metric_names(table: pd.DataFrame) -> list[str]:
    """The metrics that a comparison's table holds."""
    fixed = {"output_a", "tokens_a"}
    return [str(c)[:-2] for c in table.columns if str(c).endswith("_a") and c not in fixed]


def _score(value: Any) -> float | None:
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else float(value)
