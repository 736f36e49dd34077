"""Evaluations and comparisons in MLflow: runs with shared metric names, and the per-example tables that its pages show.

One run per evaluated version (metrics ``exact_match``, …; table ``examples.json``) and one per comparison (metrics
``exact_match.diff``, ``.low``, ``.high``; tables ``comparison.json`` and ``speed.json``; ``comparison_result.json``). With the
table and the run's parameters (confidence, resamples, seed, and each metric's bound) every interval can be computed again:
``metrics_from_table`` does.

What was written is read back and counted: a store that lost rows raises, it does not stay silent.

Boundary: the record. Nothing here sends a request.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.evals.compare import Statistics, compare_rows
from workbench.evals.errors import RecordLostError
from workbench.evals.report import Comparison, PairedMetric, from_table, to_table
from workbench.evals.scorers import Metric, reference_text

if TYPE_CHECKING:
    import pandas as pd

    from workbench.evals.evaluate import Evaluation
    from workbench.evals.gate import Decision
    from workbench.settings import Settings

EXAMPLES_TABLE = "examples.json"
COMPARISON_TABLE = "comparison.json"
SPEED_TABLE = "speed.json"
RESULT_FILE = "comparison_result.json"


def save_evaluation(
    evaluation: Evaluation, settings: Settings, *, tags: Mapping[str, str] | None = None
) -> str:
    """Log one version's evaluation as an MLflow run; the run's id.

    Raises:
        RegistryUnreachableError: MLflow does not answer.
        RecordLostError: the stored table has fewer rows than the evaluation.
    """
    from workbench import tracking

    options = evaluation.options
    run = tracking.start_run(
        settings,
        "evaluation",
        f"{evaluation.version} on {evaluation.dataset.name}",
        params={
            **asdict(options),
            "version": evaluation.version,
            "dataset": evaluation.dataset.name,
            "dataset_digest": evaluation.dataset.digest,
            "num_examples": len(evaluation.dataset),
            "backend": evaluation.backend,
        },
        tags={"quire.kind": "evaluation", "quire.version": evaluation.version, **(tags or {})},
    )
    with run:
        run.log_metrics({**evaluation.means(), "num_examples": float(len(evaluation.rows))})
        run.log_table(EXAMPLES_TABLE, evaluation_table(evaluation))
        _count(settings, run.id, EXAMPLES_TABLE, len(evaluation.rows))
    return run.id


def save_comparison(
    comparison: Comparison,
    settings: Settings,
    *,
    decision: Decision | None = None,
    runs: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Log a comparison as an MLflow run; the run's id. `runs`: the evaluations' run ids by "a" and "b".

    Raises:
        RegistryUnreachableError: MLflow does not answer.
        RecordLostError: the stored table has fewer rows than the comparison.
    """
    from workbench import tracking

    verdict = decision.verdict.value if decision else "none"
    run = tracking.start_run(
        settings,
        "evaluation",
        f"{comparison.a} → {comparison.b} on {comparison.dataset}",
        params={
            "a": comparison.a,
            "b": comparison.b,
            "dataset": comparison.dataset,
            "dataset_digest": comparison.dataset_digest,
            "num_examples": comparison.n,
            "confidence": comparison.confidence,
            "resamples": comparison.resamples,
            "seed": comparison.seed,
            "metrics": json.dumps([asdict(_metric(m)) for m in comparison.metrics.values()]),
        },
        tags={
            "quire.kind": "comparison",
            "quire.verdict": verdict,
            **{f"quire.run_{name}": run_id for name, run_id in (runs or {}).items()},
            **(tags or {}),
        },
    )
    with run:
        run.log_metrics(_figures(comparison))
        run.log_table(COMPARISON_TABLE, to_table(comparison.rows, list(comparison.metrics)))
        if comparison.speed_rows:
            run.log_table(SPEED_TABLE, speed_table(comparison))
        result = {**comparison.to_dict(), **(decision.to_dict() if decision else {})}
        run.log_dict(result, RESULT_FILE)
        _count(settings, run.id, COMPARISON_TABLE, comparison.n)
    return run.id


def evaluation_table(evaluation: Evaluation) -> pd.DataFrame:
    """One version's rows; the same columns for every version, so that MLflow lays runs side by side."""
    import pandas as pd

    examples = evaluation.dataset.examples
    columns: dict[str, list[Any]] = {
        "id": [row.example_id for row in evaluation.rows],
        "question": [example.question for example in examples],
        "expected": ["" if e.expected is None else reference_text(e) for e in examples],
        "output": [row.output for row in evaluation.rows],
        "tags": [json.dumps(dict(e.tags), sort_keys=True, ensure_ascii=False) for e in examples],
        "finish_reason": [row.finish_reason for row in evaluation.rows],
        "logprob": [row.logprob for row in evaluation.rows],
        "token_ids": [json.dumps(list(row.token_ids)) for row in evaluation.rows],
    }
    for metric in evaluation.metrics:
        columns[metric.name] = [row.scores[metric.name] for row in evaluation.rows]
    return pd.DataFrame(columns, dtype=object)  # texts as objects: pandas warns MLflow of its own text type


def speed_table(comparison: Comparison) -> pd.DataFrame:
    """The measured requests, in the order in which they ran."""
    import pandas as pd

    return pd.DataFrame([asdict(row) for row in comparison.speed_rows], dtype=object)


def load_table(settings: Settings, run_id: str, name: str = COMPARISON_TABLE) -> pd.DataFrame:
    """A table as MLflow holds it. Raises RecordLostError: the run has none of that name."""
    import pandas as pd

    stored = _stored(settings, run_id, name)
    return pd.DataFrame(stored["data"], columns=stored["columns"])


def load_result(settings: Settings, run_id: str) -> dict[str, Any]:
    """What `save_comparison` stored of a comparison's figures and verdict. Raises RecordLostError."""
    return _stored(settings, run_id, RESULT_FILE)


def _stored(settings: Settings, run_id: str, name: str) -> dict[str, Any]:
    import tempfile

    from workbench import tracking

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    client = tracking.client(settings)
    with tracking.reachable(settings), tempfile.TemporaryDirectory() as folder:
        if name not in {item.path for item in client.list_artifacts(run_id)}:
            raise RecordLostError(f"run {run_id} has no record {name!r}", value=name, param="run_id")
        text = Path(client.download_artifacts(run_id, name, folder)).read_text("utf-8")
    value: dict[str, Any] = json.loads(text)
    return value


def metrics_from_table(
    table: pd.DataFrame, metrics: Sequence[Metric], statistics: Statistics | None = None
) -> tuple[dict[str, PairedMetric], list[PairedMetric]]:
    """Metrics and slices of a comparison, computed again from its stored table."""
    return compare_rows(from_table(table), metrics, statistics)


def stored_setup(settings: Settings, run_id: str) -> tuple[list[Metric], Statistics]:
    """The metrics and statistical settings of a stored comparison."""
    from workbench import tracking

    client = tracking.client(settings)
    with tracking.reachable(settings):
        params = client.get_run(run_id).data.params
    metrics = [Metric(**values) for values in json.loads(params["metrics"])]
    return metrics, Statistics(float(params["confidence"]), int(params["resamples"]), int(params["seed"]))


def _count(settings: Settings, run_id: str, name: str, expected: int) -> None:
    saved = len(load_table(settings, run_id, name))
    if saved != expected:
        raise RecordLostError(
            f"MLflow holds {saved} of {expected} rows of {name} in run {run_id}", value=saved, limit=expected,
            remedy="Run it again; see MLflow's log for the reason.",
        )  # fmt: skip


def _figures(comparison: Comparison) -> dict[str, float]:
    figures: dict[str, float] = {"num_examples": float(comparison.n)}
    for name, metric in comparison.metrics.items():
        figures |= {f"{name}.a": metric.a, f"{name}.b": metric.b, f"{name}.diff": metric.diff}
        if metric.low is not None and metric.high is not None:
            figures |= {f"{name}.low": metric.low, f"{name}.high": metric.high}
        figures[f"{name}.p_value"] = metric.p_value
    for name, speed in comparison.speed.items():
        figures |= {f"{name}.a": speed.a, f"{name}.b": speed.b, f"{name}.diff": speed.diff}
    return {_metric_name(name): value for name, value in figures.items()}


def _metric_name(name: str) -> str:
    """MLflow's names hold letters, digits and ``_-. /:`` only."""
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)[:250]


def _metric(paired: PairedMetric) -> Metric:
    return Metric(paired.name, paired.higher_is_better, paired.bound)
