"""The jobs "compare" and "gate" on a real MLflow store (SQLite): what is recorded can be recomputed by anybody."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from workbench.evals import errors, job, record
from workbench.settings import Settings

Make = Callable[..., Any]


class Context:
    """What a job is given, keeping what it is told."""

    job_id = "test-job"

    def __init__(self, settings: Settings) -> None:
        self.settings, self.home_dir = settings, settings.home_dir
        self.told: list[tuple[float, str]] = []
        self.partials: list[dict[str, Any]] = []

    def report(self, fraction: float, message: str) -> None:
        self.told.append((fraction, message))

    def partial(self, value: dict[str, Any]) -> None:
        json.dumps(value)
        self.partials.append(value)

    def check_cancelled(self) -> None: ...


@pytest.fixture
def backend(table_backend: Make, answers: Make) -> Any:
    return table_backend({"v1": answers(lambda i: i % 3 == 0), "v2": answers(lambda i: i % 9 == 0)})


@pytest.fixture
def settings(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("HOME_DIR", str(shared_home))
    return Settings(home_dir=shared_home)


@pytest.fixture
def sums_file(make_sums: Make, tmp_path: Path) -> Path:
    make_sums(150, 3)
    return tmp_path / "sums150.jsonl"


def spec(file: Path, **fields: Any) -> dict[str, Any]:
    base = {
        "a": "v1",
        "b": "v2",
        "dataset": str(file),
        "scorers": ["exact_match", "field_f1", "perplexity"],
        "seed": 3,
    }
    return {**base, "speed": True, **fields}


def test_the_recorded_table_gives_the_same_intervals_to_an_independent_computation(
    backend: Any, sums_file: Path, settings: Settings
) -> None:
    context = Context(settings)
    outcome = job.run_setup(job.prepare(spec(sums_file), settings), backend, context)  # type: ignore[arg-type]
    result = json.loads(json.dumps(outcome.to_dict()))
    table = record.load_table(settings, result["run_id"])
    assert len(table) == result["rows_saved"] == 150
    for name, metric in result["metrics"].items():
        a, b = table[f"{name}_a"].to_numpy(float), table[f"{name}_b"].to_numpy(float)
        assert (metric["a"], metric["b"], metric["n"]) == (
            pytest.approx(a.mean()),
            pytest.approx(b.mean()),
            150,
        )
        assert metric["diff"] == pytest.approx((b - a).mean(), abs=1e-12)
        recomputed = independent_interval(b - a, name, result["resamples"], result["seed"])
        assert (metric["low"], metric["high"]) == pytest.approx(recomputed, abs=2e-5), name
    exact = result["metrics"]["exact_match"]
    wins, losses = (
        int((table.exact_match_b > table.exact_match_a).sum()),
        int((table.exact_match_b < table.exact_match_a).sum()),
    )
    assert exact["p_value"] == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    for piece in result["slices"]:
        if piece["name"] == "exact_match":
            rows = table[
                [json.loads(tags)["slice"] == piece["slice"].removeprefix("slice=") for tags in table.tags]
            ]
            assert piece["n"] == len(rows) == 50
            assert piece["diff"] == pytest.approx((rows.exact_match_b - rows.exact_match_a).mean())
    assert [f for f, _ in context.told] == sorted(f for f, _ in context.told)
    assert set(context.partials[-1]["runs"]) == {"a", "b"}


def test_divergence_is_recorded_when_the_spec_asks_for_it(
    backend: Any, make_sums: Make, tmp_path: Path, settings: Settings
) -> None:
    make_sums(8)
    asked = spec(tmp_path / "sums8.jsonl", speed=False, divergence=True)
    outcome = job.run_setup(job.prepare(asked, settings), backend, Context(settings))  # type: ignore[arg-type]
    result = json.loads(json.dumps(outcome.to_dict()))
    assert result["divergence"]["n"] == 8
    assert record.load_result(settings, result["run_id"])["divergence"] == result["divergence"]
    with pytest.raises(errors.CompareSpecError, match="divergence must be true or false, got 1") as caught:
        job.prepare({**asked, "divergence": 1}, settings)
    assert (caught.value.param, caught.value.value) == ("divergence", 1)


def independent_interval(x: np.ndarray, name: str, resamples: int, seed: int) -> tuple[float, float]:
    """Written from the papers, sharing no code: Tango's score equation by root finding; BCa with Hesterberg's levels."""
    n, z = len(x), stats.norm.ppf(0.975)
    if name != "perplexity" and set(np.unique(x)) <= {-1.0, 0.0, 1.0}:
        wins, losses = int((x == 1).sum()), int((x == -1).sum())

        def score(d: float) -> float:
            # most likely loss rate given the difference: the root of the likelihood equation
            linear, constant = (2 * n - wins + losses) * d - wins - losses, -losses * d * (1 - d)
            q = (math.sqrt(linear**2 - 8 * n * constant) - linear) / (4 * n)
            return (wins - losses - n * d) / math.sqrt(n * (2 * q + d * (1 - d)))

        middle = (wins - losses) / n
        low = optimize.brentq(lambda d: score(d) - z, -1 + 1e-9, middle - 1e-12)
        high = optimize.brentq(lambda d: score(d) + z, middle + 1e-12, 1 - 1e-9)
        return low, high
    if np.ptp(x) == 0:
        return float(x[0]), float(x[0])
    sign = -1.0 if x.mean() < 0 else 1.0
    y = sign * x
    boot = y[np.random.default_rng(seed).integers(0, n, (resamples, n))].mean(axis=1)
    z0 = stats.norm.ppf(
        (np.sum(boot < y.mean() - 1e-12) + 0.5 * np.sum(np.abs(boot - y.mean()) <= 1e-12)) / resamples
    )
    jackknife = np.array([np.delete(y, i).mean() for i in range(n)])
    pull = jackknife.mean() - jackknife
    a = np.sum(pull**3) / (6 * np.sum(pull**2) ** 1.5)
    reach = math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1)
    levels = [stats.norm.cdf(z0 + (z0 + r) / (1 - a * (z0 + r))) for r in (-reach, reach)]
    low, high = np.quantile(boot, levels)
    return (float(low), float(high)) if sign > 0 else (-float(high), -float(low))


@pytest.mark.full
def test_bca_metrics_are_recomputed_too(table_backend: Make, write_dataset: Make, settings: Settings) -> None:
    """Answers with two fields of which one may be wrong: differences of F1 that are no whole wins."""

    def version(first: int, second: int) -> Any:
        def answer(question: str, _seed: int) -> str:
            i = int(question.split()[0])
            return json.dumps({"x": i if i % first else -1, "y": i if i % second else -1})

        return answer

    lines = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"{i} ?"}], "expected": {"x": i, "y": i}}
        for i in range(1, 181)
    ]
    path = write_dataset(lines, "pairs.jsonl")
    backend = table_backend({"v1": version(2, 3), "v2": version(5, 4)})
    for order in (("v1", "v2"), ("v2", "v1")):
        made = spec(path, a=order[0], b=order[1], scorers=["field_f1"], speed=False, max_tokens=32)
        outcome = job.run_setup(job.prepare(made, settings), backend, Context(settings))  # type: ignore[arg-type]
        metric = outcome.comparison.metrics["field_f1"]
        assert metric.method == "bca"
        table = record.load_table(settings, outcome.run_id)
        x = (table.field_f1_b - table.field_f1_a).to_numpy(float)
        assert (metric.low, metric.high) == pytest.approx(independent_interval(x, "", 10_000, 3), abs=1e-4)


def test_what_is_stored_is_what_was_found(backend: Any, sums_file: Path, settings: Settings) -> None:
    from workbench import tracking

    outcome = job.run_setup(job.prepare(spec(sums_file), settings), backend, Context(settings))  # type: ignore[arg-type]
    metrics, statistics = record.stored_setup(settings, outcome.run_id)
    again, slices = record.metrics_from_table(
        record.load_table(settings, outcome.run_id), metrics, statistics
    )
    assert again == outcome.comparison.metrics
    assert tuple(slices) == outcome.comparison.slices
    stored = record.load_result(settings, outcome.run_id)
    assert stored["metrics"] == json.loads(json.dumps(outcome.to_dict()))["metrics"]
    assert stored["verdict"] == outcome.decision.verdict.value

    client = tracking.client(settings)
    runs = {name: client.get_run(run_id) for name, run_id in outcome.runs.items()}
    assert (
        set(runs["a"].data.metrics)
        == set(runs["b"].data.metrics)
        >= {"exact_match", "field_f1", "perplexity"}
    )
    assert runs["a"].data.metrics["exact_match"] == pytest.approx(outcome.comparison.metrics["exact_match"].a)
    for run in runs.values():
        assert "examples.json" in run.data.tags["mlflow.loggedArtifacts"]  # MLflow's evaluation view lists it
        assert len(record.load_table(settings, run.info.run_id, record.EXAMPLES_TABLE)) == 150
    speed = record.load_table(settings, outcome.run_id, record.SPEED_TABLE)
    assert len(speed) == len(outcome.comparison.speed_rows) > 0
    comparison_run = client.get_run(outcome.run_id)
    assert comparison_run.data.tags["quire.run_a"] == outcome.runs["a"]
    assert comparison_run.info.status == "FINISHED"


def test_a_store_that_loses_rows_is_found_out(
    backend: Any, sums_file: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.tracking import TrackedRun

    whole = TrackedRun.log_table
    monkeypatch.setattr(
        TrackedRun, "log_table", lambda run, name, table: whole(run, name, table.head(len(table) - 1))
    )
    with pytest.raises(errors.RecordLostError, match="149 of 150 rows"):
        job.run_setup(job.prepare(spec(sums_file), settings), backend, Context(settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"a": ""}, errors.CompareSpecError, "a must be given"),
        ({"b": 3}, errors.CompareSpecError, "b must be given"),
        ({"limit": 0}, errors.CompareSpecError, "limit must be an integer of at least 1"),
        ({"seed": -1}, errors.CompareSpecError, "seed must be"),
        ({"speed": "yes"}, errors.CompareSpecError, "speed must be true or false"),
        ({"scorers": "exact_match"}, errors.CompareSpecError, "scorers must be a list"),
        ({"scorers": ["bleu"]}, errors.UnknownScorerError, "no scorer 'bleu'"),
        ({"scorers": ["regex"]}, errors.ScorerError, "regex cannot score example"),
        ({"dataset": "nobody"}, errors.DatasetNotFoundError, "nobody"),
        ({"gate": "/nowhere/rules.toml"}, errors.GateRulesError, "cannot be read"),
        ({"colour": "red"}, errors.CompareSpecError, "unknown field 'colour'"),
    ],
)
def test_a_spec_that_cannot_run_is_refused_before_anything_starts(
    sums_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fields: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setenv("HOME_DIR", str(tmp_path / "untouched"))
    with pytest.raises(error, match=message):
        job.check(spec(sums_file, **fields))
    assert not (tmp_path / "untouched").exists()


def test_a_rule_that_names_no_metric_is_refused_before_anything_starts(
    sums_file: Path, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rules]]\nkind = "better"\nmetric = "accuracy"\n')
    with pytest.raises(errors.UnknownMetricError, match="'accuracy'"):
        job.check(spec(sums_file, gate=str(rules)))


def test_rules_bring_the_scorers_and_the_measurement_that_they_need(
    sums_file: Path, settings: Settings, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(
        'confidence = 0.9\n[[rules]]\nkind = "not_worse"\nmetric = "json_valid"\nmax_loss = 0.1\n'
        '[[rules]]\nkind = "speed_not_worse"\nmetric = "ttft_ms"\nmax_percent = 10\n'
    )
    setup = job.prepare(spec(sums_file, scorers=["exact_match"], speed=False, gate=str(rules)), settings)
    assert [scorer.metric.name for scorer in setup.scorers] == ["exact_match", "json_valid"]
    assert setup.speed is not None
    assert setup.statistics.confidence == 0.9
