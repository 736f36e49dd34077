"""The job kind "compare": two versions on one dataset, recorded in MLflow, with a verdict.

    {"a": ref, "b": ref, "dataset": path or name, "scorers": [names] | null, "limit": n | null, "seed": 0, "speed": true,
     "gate": path of rules | null, "max_tokens": 256, "divergence": false}

Result: ``metrics`` {name: {a, b, diff, low, high, n, …}}, ``slices``, ``speed``, ``verdict``, ``reasons``, ``run_id``,
``runs`` {a, b}, ``dataset``, ``repeatable``, ``divergence``, ``rows_saved``.

Boundary: from a spec to a result. The work is in `compare`, `gate` and `record`; jobs are run by `workbench.jobs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from workbench.backends.endpoints import is_endpoint
from workbench.evals.compare import Statistics, compare
from workbench.evals.datasets import Dataset, load_dataset, log_dataset
from workbench.evals.endpoint_side import check_endpoint_side
from workbench.evals.errors import CompareSpecError
from workbench.evals.evaluate import Evaluation, EvaluationOptions
from workbench.evals.gate import Decision, GateRules, check_rules, decide, fitting_rules, load_rules
from workbench.evals.record import save_comparison, save_evaluation
from workbench.evals.report import Comparison
from workbench.evals.scorers import SCORERS, Scorer, check_scorers, default_scorers, make_scorers
from workbench.evals.speed import SpeedOptions

if TYPE_CHECKING:
    from workbench.backends.protocol import Backend
    from workbench.jobs import JobContext
    from workbench.settings import Settings

_FIELDS = {"a", "b", "dataset", "scorers", "limit", "seed", "speed", "gate", "max_tokens", "divergence"}


@dataclass(frozen=True, slots=True)
class Setup:
    """A checked spec: everything that a comparison needs, read and consistent."""

    a: str
    b: str
    dataset: Dataset
    scorers: tuple[Scorer, ...]
    rules: GateRules
    options: EvaluationOptions
    speed: SpeedOptions | None
    statistics: Statistics
    divergence: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """A comparison that was made, judged and recorded."""

    comparison: Comparison
    decision: Decision
    run_id: str
    runs: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.comparison.to_dict(),
            **self.decision.to_dict(),
            "run_id": self.run_id,
            "runs": dict(self.runs),
            "rows_saved": self.comparison.n,
        }


def check(spec: dict[str, Any]) -> None:
    """Refuse a spec that cannot run. Raises CompareSpecError, DatasetError, UnknownScorerError, ScorerError, GateRulesError."""
    from workbench import settings

    prepare(spec, settings.load())


def run(spec: dict[str, Any], context: JobContext) -> dict[str, Any]:
    """Compare, judge, record."""
    from workbench.backends.by_id import ByIdBackend
    from workbench.connect import connect

    setup = prepare(spec, context.settings)
    open_record(context.settings)
    local = partial(connect, context.home_dir)
    sides = [setup.a, setup.b]
    with ByIdBackend(context.settings, local) if any(map(is_endpoint, sides)) else local() as backend:
        return run_setup(setup, backend, context).to_dict()


def open_record(settings: Settings) -> None:
    """See that MLflow can be written before minutes of work. Raises RegistryUnreachableError."""
    from workbench import tracking

    tracking.experiment(settings, "evaluation")


def run_setup(setup: Setup, backend: Backend, context: JobContext) -> Outcome:
    """The comparison itself: also what the gate runs."""
    settings = context.settings
    context.report(0.0, f"Recording the dataset {setup.dataset.name}")
    dataset_id = log_dataset(setup.dataset, settings)
    tags = {"quire.job": context.job_id, "quire.dataset_id": dataset_id}
    runs: dict[str, str] = {}
    means: dict[str, dict[str, float]] = {}

    def keep(name: str, evaluation: Evaluation) -> None:
        runs[name] = save_evaluation(evaluation, settings, tags=tags)
        means[name] = evaluation.means()
        context.partial({"runs": dict(runs), "means": dict(means)})

    comparison = compare(
        backend, setup.a, setup.b, setup.dataset, setup.scorers, options=setup.options, speed=setup.speed,
        statistics=setup.statistics, divergence=setup.divergence, on_evaluation=keep, check_cancelled=context.check_cancelled,
        on_progress=lambda fraction, message: context.report(0.02 + 0.94 * fraction, message),
    )  # fmt: skip
    context.report(0.97, "Recording the comparison")
    decision = decide(setup.rules, comparison)
    run_id = save_comparison(comparison, settings, decision=decision, runs=runs, tags=tags)
    return Outcome(comparison, decision, run_id, runs)


def prepare(spec: Mapping[str, Any], settings: Settings) -> Setup:
    """Read dataset, scorers and rules of a spec and see that they fit each other. Raises as `check`."""
    unknown = sorted(set(spec) - _FIELDS)
    if unknown:
        raise _wrong(f"unknown field {unknown[0]!r}", unknown[0], sorted(_FIELDS))
    a, b = (_text(spec, name) for name in ("a", "b"))
    limit, seed = _whole(spec, "limit", None, 1), _whole(spec, "seed", 0, 0) or 0
    max_tokens = _whole(spec, "max_tokens", 256, 1) or 256
    dataset = load_dataset(_text(spec, "dataset"), settings).sample(limit)
    wants_speed, divergence = _flag(spec, "speed", True), _flag(spec, "divergence", False)
    own = load_rules(spec["gate"]) if spec.get("gate") is not None else None
    scorers = make_scorers(_scorer_names(spec.get("scorers"), dataset, own))
    check_scorers(scorers, dataset)
    speed_needed = wants_speed or (own is not None and own.needs_speed)
    for side in filter(is_endpoint, (a, b)):
        check_endpoint_side(side, dataset, scorers, settings, speed=speed_needed, divergence=divergence)
    speed = SpeedOptions(seed=seed) if speed_needed else None
    metrics = [scorer.metric for scorer in scorers]
    rules = own or fitting_rules(
        metrics, has_slices=any(e.tags for e in dataset.examples), speed=speed is not None
    )
    check_rules(rules, [metric.name for metric in metrics])
    statistics = Statistics(confidence=rules.confidence, seed=seed)
    options = EvaluationOptions(max_tokens=max_tokens, seed=seed)
    return Setup(a, b, dataset, tuple(scorers), rules, options, speed, statistics, divergence)


def _scorer_names(given: Any, dataset: Dataset, rules: GateRules | None) -> list[str]:
    """The scorers asked for, or those that fit the dataset; and those that the rules name besides."""
    if given is not None and (not isinstance(given, list) or not all(isinstance(n, str) for n in given)):
        raise _wrong(f"scorers must be a list of names, got {given!r}", given, sorted(SCORERS))
    names = list(given) if given else default_scorers(dataset)
    if rules is not None:
        names += [n for n in rules.metrics if n not in names and (n in SCORERS or ":" in n)]
    if not names:
        raise _wrong("no scorer fits this dataset by itself", dataset.name, sorted(SCORERS), "scorers")
    return names


def _text(spec: Mapping[str, Any], name: str) -> str:
    value = spec.get(name)
    if not isinstance(value, str) or not value:
        raise _wrong(f"{name} must be given as a text, got {value!r}", value, "text", name)
    return value


def _flag(spec: Mapping[str, Any], name: str, default: bool) -> bool:
    value = spec.get(name, default)
    if not isinstance(value, bool):
        raise _wrong(f"{name} must be true or false, got {value!r}", value, "true or false", name)
    return value


def _whole(spec: Mapping[str, Any], name: str, default: int | None, low: int) -> int | None:
    value = spec.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise _wrong(f"{name} must be an integer of at least {low}, got {value!r}", value, low, name)
    return value


def _wrong(message: str, value: Any, limit: Any, param: str = "spec") -> CompareSpecError:
    return CompareSpecError(message, value=value, limit=limit, param=param)
