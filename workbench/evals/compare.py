"""Compare two versions: both answer the same requests, every difference gets its interval, slices are controlled together.

    compare           load, evaluate and time both versions through a backend
    compare_rows      the statistics alone, from rows: what notebooks, tests and the stored table recompute

Quality is measured on deterministic engines, so that a difference comes from the weights; a version that stands against itself
is loaded a second time and runs in other batches, and must come out as exactly 0 on every row. Speed is measured on engines as
they serve, each version alone (`workbench.evals.speed`).

Boundary: computes. Storing is `workbench.evals.record`'s, judging `workbench.evals.gate`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from workbench.backends.endpoints import is_endpoint
from workbench.evals.datasets import Dataset, Example
from workbench.evals.divergence import measure_divergence
from workbench.evals.errors import CompareSpecError
from workbench.evals.evaluate import (
    CheckCancelled,
    Evaluation,
    EvaluationOptions,
    OnProgress,
    Row,
    check_repeatable,
    evaluate,
)
from workbench.evals.report import Comparison, PairedMetric, PairRow
from workbench.evals.scorers import Metric, Scorer, check_scorers, reference_text
from workbench.evals.speed import SpeedMetric, SpeedOptions, SpeedRow, measure_speed, speed_metrics
from workbench.evals.statistics import (
    CONFIDENCE,
    RESAMPLES,
    examples_needed,
    holm,
    minimal_detectable_effect,
    paired_interval,
    paired_p_value,
)

if TYPE_CHECKING:
    from workbench.backends.protocol import Backend

OnEvaluation = Callable[[str, Evaluation], None]  # "a" or "b", and its rows
MIN_SLICE = 5  # examples below which a slice is not shown


@dataclass(frozen=True, slots=True)
class Statistics:
    """How sure one wants to be, and the seed of what is drawn."""

    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES
    seed: int = 0


def compare(
    backend: Backend,
    a: str,
    b: str,
    dataset: Dataset,
    scorers: Sequence[Scorer],
    *,
    options: EvaluationOptions | None = None,
    speed: SpeedOptions | None = None,
    statistics: Statistics | None = None,
    divergence: bool = False,
    on_evaluation: OnEvaluation | None = None,
    on_progress: OnProgress | None = None,
    check_cancelled: CheckCancelled | None = None,
) -> Comparison:
    """Version `b` against version `a`. `speed`: None leaves it out. `on_evaluation` sees each version's rows as soon as they are there.

    `divergence`: also how far B's token distributions lie from A's, exactly; both versions are in memory at once for it.

    Raises:
        ScorerError: a scorer does not fit the dataset; nothing was loaded.
        RequestsFailedError: a request failed.
    """
    options, statistics = options or EvaluationOptions(), statistics or Statistics()
    check_scorers(scorers, dataset)
    say = on_progress or (lambda _fraction, _message: None)
    share = 0.4 if speed else 0.5
    evaluations: list[Evaluation] = []
    repeatable = None
    for place, ref in enumerate((a, b)):
        say(share * place, f"Loading {ref}")
        with _loaded(backend, ref, deterministic=True) as model_id:
            same = replace(options, order_seed=7, max_concurrency=max(1, options.max_concurrency - 5))
            done = evaluate(
                backend, model_id, dataset, scorers, same if place and a == b else options, version=ref,
                on_progress=_part(say, share * place, share), check_cancelled=check_cancelled,
            )  # fmt: skip
            evaluations.append(done)
            if on_evaluation is not None:
                on_evaluation("ab"[place], done)
            if place == 1 and not is_endpoint(ref):  # what cannot tell its tokens cannot prove them
                repeatable = check_repeatable(backend, done)
    apart = None
    if divergence:
        say(2 * share, "Loading both versions to compare their distributions")
        with (
            _loaded(backend, a, deterministic=True) as model_a,
            _loaded(backend, b, deterministic=True) as model_b,
        ):
            apart = measure_divergence(
                backend, model_a, model_b, evaluations[0], confidence=statistics.confidence,
                resamples=statistics.resamples, seed=statistics.seed, on_progress=_part(say, 2 * share, 0.0),
                check_cancelled=check_cancelled,
            )  # fmt: skip
    speed_rows: list[SpeedRow] = []
    if speed is not None:
        say(2 * share, "Loading both versions to time them")
        with _loaded(backend, a) as model_a, _loaded(backend, b) as model_b:
            speed_rows = measure_speed(
                backend, model_a, model_b, dataset, speed,
                on_progress=_part(say, 2 * share, 1 - 2 * share), check_cancelled=check_cancelled,
            )  # fmt: skip
    say(1.0, "Computing intervals")
    found = compare_evaluations(*evaluations, statistics=statistics)
    return replace(
        found,
        speed=speed_of(speed_rows, statistics),
        speed_rows=tuple(speed_rows),
        repeatable=repeatable,
        divergence=apart,
    )


def compare_evaluations(a: Evaluation, b: Evaluation, *, statistics: Statistics | None = None) -> Comparison:
    """Two evaluations of the same requests, paired row by row.

    Raises:
        CompareSpecError: other examples, other metrics, or another seed.
    """
    statistics = statistics or Statistics()
    for what, left, right in (
        ("datasets", a.dataset.digest, b.dataset.digest),
        ("metrics", a.metrics, b.metrics),
        ("seeds", a.options.seed, b.options.seed),
        ("temperatures", a.options.temperature, b.options.temperature),
        ("output limits", a.options.max_tokens, b.options.max_tokens),
    ):
        if left != right:
            raise CompareSpecError(
                f"{a.version} and {b.version} were evaluated with different {what}", value=str(right), limit=str(left),
                remedy="Evaluate both in one comparison.",
            )  # fmt: skip
    rows = [
        _pair_row(example, left, right)
        for example, left, right in zip(a.dataset.examples, a.rows, b.rows, strict=True)
    ]
    metrics, slices = compare_rows(rows, a.metrics, statistics)
    return Comparison(
        a.version, b.version, a.dataset.name, a.dataset.digest, metrics, tuple(slices), tuple(rows),
        statistics.confidence, statistics.resamples, statistics.seed,
    )  # fmt: skip


def compare_rows(
    rows: Sequence[PairRow], metrics: Sequence[Metric], statistics: Statistics | None = None
) -> tuple[dict[str, PairedMetric], list[PairedMetric]]:
    """Every metric over all rows, and over each slice of at least 5 rows with Holm's correction over its tag's slices."""
    statistics = statistics or Statistics()
    overall: dict[str, PairedMetric] = {}
    for metric in metrics:
        found = paired_metric(rows, metric, statistics)
        if found is not None:
            overall[metric.name] = found
    slices: list[PairedMetric] = []
    for family in _families(rows).values():
        for name in overall:
            metric = next(m for m in metrics if m.name == name)
            slices += adjusted(
                [
                    found
                    for label, members in family.items()
                    if (found := paired_metric(members, metric, statistics, label)) and found.n >= MIN_SLICE
                ],
                statistics.confidence,
            )
    return overall, slices


def adjusted(family: Sequence[PairedMetric], confidence: float = CONFIDENCE) -> list[PairedMetric]:
    """The same slices with p-values after Holm, and what is proven after that."""
    p_values = holm([metric.p_value for metric in family])
    return [
        replace(metric, p_adjusted=p, proven=metric.proven and p <= 1 - confidence)
        for metric, p in zip(family, p_values, strict=True)
    ]


def paired_metric(
    rows: Sequence[PairRow], metric: Metric, statistics: Statistics, label: str | None = None
) -> PairedMetric | None:
    """One metric over these rows; None when no row was scored for both versions."""
    pairs = [pair for row in rows if (pair := row.pair(metric.name)) is not None]
    if not pairs:
        return None
    values = np.array(pairs, np.float64)
    differences = values[:, 1] - values[:, 0]
    confidence, seed = statistics.confidence, statistics.seed
    interval = paired_interval(
        differences, bound=metric.bound, confidence=confidence, resamples=statistics.resamples, seed=seed
    )
    p_value = paired_p_value(differences, seed=seed, resamples=statistics.resamples)
    gains = differences if metric.higher_is_better else -differences
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    detectable = minimal_detectable_effect(differences, bound=metric.bound, confidence=confidence)
    return PairedMetric(
        name=metric.name,
        a=float(values[:, 0].mean()),
        b=float(values[:, 1].mean()),
        diff=interval.estimate,
        low=interval.low,
        high=interval.high,
        n=len(pairs),
        wins=wins,
        losses=losses,
        ties=len(pairs) - wins - losses,
        p_value=p_value,
        p_adjusted=p_value,
        proven=interval.excludes_zero and p_value <= 1 - confidence,
        higher_is_better=metric.higher_is_better,
        bound=metric.bound,
        method=interval.method,
        detectable=detectable if math.isfinite(detectable) else None,
        examples_needed=examples_needed(
            interval.estimate, differences, bound=metric.bound, confidence=confidence
        ),
        slice=label,
    )


def speed_of(rows: Sequence[SpeedRow], statistics: Statistics) -> dict[str, SpeedMetric]:
    """Speed figures with intervals; empty when speed was not measured."""
    if not rows:
        return {}
    return speed_metrics(
        rows, confidence=statistics.confidence, resamples=statistics.resamples, seed=statistics.seed
    )


def _families(rows: Sequence[PairRow]) -> dict[str, dict[str, list[PairRow]]]:
    """Rows by tag and ``tag=value``; tags that do not tell rows apart are left out."""
    families: dict[str, dict[str, list[PairRow]]] = {}
    for row in rows:
        for tag, value in row.tags.items():
            families.setdefault(tag, {}).setdefault(f"{tag}={value}", []).append(row)
    return {
        tag: dict(sorted(family.items()))
        for tag, family in sorted(families.items())
        if len(family) > 1 and len(family) <= len(rows) // 2
    }


def _pair_row(example: Example, a: Row, b: Row) -> PairRow:
    assert a.example_id == b.example_id == example.id, (a.example_id, b.example_id, example.id)
    return PairRow(
        example.id, example.question, "" if example.expected is None else reference_text(example), dict(example.tags),
        a.output, b.output, len(a.token_ids), len(b.token_ids), a.scores, b.scores,
    )  # fmt: skip


def _part(say: OnProgress, start: float, share: float) -> OnProgress:
    """Progress of one part of the work, as progress of the whole."""
    return lambda fraction, message: say(start + share * fraction, message)


@contextmanager
def _loaded(backend: Backend, ref: str, *, deterministic: bool = False) -> Iterator[str]:
    """The version as a resident model; unloaded afterwards unless it was there before."""
    before = set(backend.models())
    model_id = backend.load(ref, deterministic=deterministic)
    try:
        yield model_id
    finally:
        if model_id not in before:
            backend.unload(model_id)
