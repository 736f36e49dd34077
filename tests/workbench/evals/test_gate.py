"""The gate: what rules may say, what each verdict needs, and how rarely a worse version is promoted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workbench.evals import errors
from workbench.evals.compare import Statistics, compare_rows
from workbench.evals.gate import (
    Verdict,
    check_rules,
    decide,
    default_rules_path,
    fitting_rules,
    load_rules,
    parse_rules,
)
from workbench.evals.report import Comparison, PairRow
from workbench.evals.scorers import SCORERS, Metric
from workbench.evals.speed import SpeedMetric

BETTER = {"kind": "better", "metric": "exact_match"}
NOT_WORSE = {"kind": "not_worse", "metric": "json_valid", "max_loss": 0.02}
SLICES = {"kind": "slices_not_worse", "metric": "exact_match", "tag": "slice", "max_loss": 0.1}
SPEED = {"kind": "speed_not_worse", "metric": "tpot_ms", "max_percent": 20}
METRICS = [Metric("exact_match"), Metric("json_valid")]


def rows(a: Any, b: Any, json_a: Any = None, json_b: Any = None, slices: int = 4) -> list[PairRow]:
    """Rows with these right/wrong scores; example i is in slice i mod `slices`."""
    n = len(a)
    ones = np.ones(n)
    json_a, json_b = (ones if v is None else v for v in (json_a, json_b))
    return [
        PairRow(
            f"e{i}", "q", "x", {"slice": f"s{i % slices}"}, "", "", 1, 1,
            {"exact_match": float(a[i]), "json_valid": float(json_a[i])},
            {"exact_match": float(b[i]), "json_valid": float(json_b[i])},
        )
        for i in range(n)
    ]  # fmt: skip


def comparison(found: list[PairRow], percent: tuple[float, float, float] = (0.0, -3.0, 3.0)) -> Comparison:
    metrics, slices = compare_rows(found, METRICS, Statistics(resamples=200))
    change, low, high = percent
    speed = SpeedMetric(
        "tpot_ms", "ms", False, 10.0, 10 + change / 10, change / 10, low / 10, high / 10, change, low, high, 8
    )
    return Comparison(
        "a", "b", "d", "0", metrics, tuple(slices), tuple(found), 0.95, 200, 0, {"tpot_ms": speed}
    )


def verdict(rules: list[dict[str, Any]], found: Comparison, **settings: Any) -> Verdict:
    return decide(parse_rules({"rules": rules, **settings}), found).verdict


def right(n: int, wrong: Callable[[int], bool]) -> np.ndarray:
    return np.array([0.0 if wrong(i) else 1.0 for i in range(n)])


V1 = right(400, lambda i: i % 5 == 0)


def test_a_truly_better_version_is_promoted_with_a_reason_for_each_rule() -> None:
    found = comparison(rows(V1, right(400, lambda i: i % 20 == 0)))
    decision = decide(parse_rules({"rules": [BETTER, NOT_WORSE, SLICES, SPEED]}), found)
    assert decision.verdict is Verdict.PROMOTE
    assert [reason.outcome for reason in decision.reasons] == [Verdict.PROMOTE] * 4
    texts = [reason.text for reason in decision.reasons]
    assert texts[0].startswith("exact_match is better: 0.8 → 0.95, difference +0.15 [+0.")
    assert "n = 400" in texts[0]
    assert "on any of 4 slices" in texts[2]


def test_a_higher_mean_alone_is_not_proven_and_says_how_many_examples_would() -> None:
    found = comparison(rows(V1, right(400, lambda i: i % 5 == 0 and i != 200 and i != 100)))
    decision = decide(parse_rules({"rules": [BETTER, NOT_WORSE, SLICES, SPEED]}), found)
    assert decision.verdict is Verdict.NOT_PROVEN
    assert decision.reasons[0].outcome is Verdict.NOT_PROVEN
    assert "examples would prove a difference of this size" in decision.reasons[0].text
    assert [r.outcome for r in decision.reasons[1:]] == [Verdict.PROMOTE] * 3


def test_better_overall_but_worse_on_a_slice_is_refused_naming_the_slice() -> None:
    candidate = right(400, lambda i: i % 4 == 3 and i % 3 == 0)  # all its errors are in slice s3
    found = comparison(rows(right(400, lambda i: i % 4 != 3 and i % 3 == 0), candidate))
    assert found.metrics["exact_match"].outcome == "better"
    decision = decide(parse_rules({"rules": [BETTER, SLICES]}), found)
    assert decision.verdict is Verdict.REFUSE
    assert [r.outcome for r in decision.reasons] == [Verdict.PROMOTE, Verdict.REFUSE]
    assert "On slice=s3 exact_match is worse by more than the allowed 0.1" in decision.reasons[1].text


@pytest.mark.parametrize(
    ("rules", "settings", "percent", "expected"),
    [
        ([SPEED], {}, (5.0, 2.0, 8.0), Verdict.PROMOTE),
        ([SPEED], {}, (15.0, 8.0, 22.0), Verdict.NOT_PROVEN),
        ([SPEED], {}, (50.0, 30.0, 70.0), Verdict.REFUSE),
        ([{**SPEED, "metric": "ttft_ms"}], {}, (0.0, -1.0, 1.0), Verdict.NOT_PROVEN),  # it was not measured
        ([BETTER], {"min_examples": 500}, (0.0, -1.0, 1.0), Verdict.NOT_PROVEN),
        ([{**BETTER, "min_gain": 0.2}], {}, (0.0, -1.0, 1.0), Verdict.NOT_PROVEN),
        ([{**SLICES, "tag": "nobody"}], {}, (0.0, -1.0, 1.0), Verdict.NOT_PROVEN),
        ([{**SLICES, "min_examples": 200}], {}, (0.0, -1.0, 1.0), Verdict.NOT_PROVEN),
    ],
)
def test_verdicts_of_single_rules(
    rules: list[dict[str, Any]],
    settings: dict[str, Any],
    percent: tuple[float, float, float],
    expected: Verdict,
) -> None:
    found = comparison(rows(V1, right(400, lambda i: i % 20 == 0)), percent)
    assert verdict(rules, found, **settings) is expected


def test_throughput_counts_the_other_way() -> None:
    found = comparison(rows(V1, V1))
    slower = SpeedMetric(
        "output_tokens_per_s", "tokens/s", True, 100, 60, -40, -45, -35, -40.0, -45.0, -35.0, 8
    )
    found = replace(found, speed={"output_tokens_per_s": slower})
    assert verdict([{**SPEED, "metric": "output_tokens_per_s"}], found) is Verdict.REFUSE
    faster = replace(slower, percent=40.0, percent_low=35.0, percent_high=45.0)
    found = replace(found, speed={"output_tokens_per_s": faster})
    assert verdict([{**SPEED, "metric": "output_tokens_per_s"}], found) is Verdict.PROMOTE


def test_a_metric_where_less_is_better_is_judged_by_its_gain() -> None:
    metric = Metric("exact_match", higher_is_better=False)
    found = rows(V1, right(400, lambda i: i % 20 == 0))
    metrics, _ = compare_rows(found, [metric], Statistics(resamples=200))
    assert metrics["exact_match"].outcome == "worse"
    judged = Comparison("a", "b", "d", "0", metrics, (), tuple(found), 0.95, 200, 0)
    assert verdict([BETTER], judged) is Verdict.REFUSE


def test_a_proven_loss_beyond_the_allowed_one_is_refused() -> None:
    broken = right(400, lambda i: i % 10 == 0)
    found = comparison(rows(V1, V1, json_b=broken))
    assert verdict([NOT_WORSE], found) is Verdict.REFUSE
    assert verdict([{**NOT_WORSE, "max_loss": 0.12}], found) is Verdict.NOT_PROVEN
    assert verdict([{**NOT_WORSE, "max_loss": 0.2}], found) is Verdict.PROMOTE


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_projects_rules_are_read_and_fit_the_scorers() -> None:
    rules = load_rules()
    assert rules.source == str(default_rules_path())
    check_rules(rules, SCORERS)
    assert rules.needs_speed
    assert rules.metrics == ["exact_match", "json_valid"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, r"at least one \[\[rules\]\]"),
        ({"rules": []}, r"at least one \[\[rules\]\]"),
        ({"rules": [{"kind": "best", "metric": "x"}]}, "rule 1: kind must be one of better"),
        (
            {"rules": [BETTER, {"kind": "not_worse", "metric": "x"}]},
            "rule 2 .* max_loss must be a number at least 0, got None",
        ),
        ({"rules": [{**NOT_WORSE, "max_loss": -1}]}, "max_loss must be a number at least 0, got -1"),
        ({"rules": [{**NOT_WORSE, "max_loss": "2 %"}]}, "max_loss must be a number"),
        ({"rules": [{**BETTER, "max_loss": 1}]}, "unknown setting 'max_loss'"),
        ({"rules": [{"kind": "better"}]}, "metric must name a metric"),
        ({"rules": [BETTER], "confidence": 95}, "confidence must be a number between 0.5 and"),
        ({"rules": [BETTER], "delta": 1}, "unknown setting 'delta'"),
        ({"rules": [{**SLICES, "tag": 3}]}, "tag must be a text"),
    ],
)
def test_rules_that_cannot_be_read_say_what_is_wrong(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.GateRulesError, match=message):
        parse_rules(rules)


def test_rule_files_that_are_missing_or_no_toml(tmp_path: Path) -> None:
    with pytest.raises(errors.GateRulesError, match="cannot be read"):
        load_rules(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[[rules]\n")
    with pytest.raises(errors.GateRulesError, match="is not TOML"):
        load_rules(tmp_path / "bad.toml")


def test_a_rule_without_a_metric_here_is_refused_by_name() -> None:
    with pytest.raises(errors.UnknownMetricError, match=r"rule 2 \(not_worse\) names the metric 'accuracy'"):
        check_rules(parse_rules({"rules": [BETTER, {**NOT_WORSE, "metric": "accuracy"}]}), ["exact_match"])
    with pytest.raises(errors.UnknownMetricError, match="tpot_ms"):
        check_rules(parse_rules({"rules": [{**SPEED, "metric": "tpot"}]}), ["exact_match"])


def test_rules_for_a_comparison_that_names_none() -> None:
    own = fitting_rules([Metric("exact_match"), Metric("json_valid")], has_slices=True, speed=False)
    assert own.source == str(default_rules_path())
    assert not own.needs_speed
    other = fitting_rules(
        [Metric("contains"), Metric("perplexity", False, None)], has_slices=False, speed=True
    )
    assert [rule.kind.value for rule in other.rules] == ["better", "speed_not_worse"]


# ── how often it errs ───────────────────────────────────────────────────────────────────────────────────────────────────


def simulated_promotions(
    trials: int, n: int, loss: float, rate: float, rules: list[dict[str, Any]], seed: int = 0
) -> float:
    """Share of comparisons that end in "promote" for a candidate that is truly worse by `loss` on every metric and slice."""
    rng = np.random.default_rng(seed)
    parsed, promoted = parse_rules({"rules": rules}), 0
    for _ in range(trials):
        draw = rng.random((2, n))
        lose, win = (rate + loss) / 2, (rate - loss) / 2
        a = [np.where(d < lose, 1.0, np.where(d < rate, 0.0, 1.0)) for d in draw]
        b = [np.where(d < lose, 0.0, 1.0) for d in draw]
        assert win >= 0
        found = comparison(rows(a[0], b[0], a[1], b[1]))
        promoted += decide(parsed, found).verdict is Verdict.PROMOTE
    return promoted / trials


ALL_NOT_WORSE = [
    {"kind": "not_worse", "metric": "exact_match", "max_loss": 0.05},
    {"kind": "not_worse", "metric": "json_valid", "max_loss": 0.05},
]


@pytest.mark.parametrize(
    "rules",
    [
        ALL_NOT_WORSE[:1],
        ALL_NOT_WORSE,
        [*ALL_NOT_WORSE, SLICES, SPEED],
        [BETTER, *ALL_NOT_WORSE, SLICES, SPEED],
    ],
)
def test_false_promotion_at_the_allowed_loss_is_rare(rules: list[dict[str, Any]]) -> None:
    assert simulated_promotions(100, 200, 0.05, 0.12, rules) <= 0.05


@pytest.mark.full
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.4])
@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize("rules", [ALL_NOT_WORSE[:1], ALL_NOT_WORSE, [*ALL_NOT_WORSE, SLICES, SPEED]])
def test_full_false_promotion_stays_below_five_percent(
    rules: list[dict[str, Any]], n: int, rate: float
) -> None:
    assert simulated_promotions(1500, n, 0.05, rate, rules, seed=n) <= 0.05


def test_a_loss_on_one_slice_alone_is_rarely_promoted() -> None:
    """The overall difference is 0, one slice of 100 is worse by exactly the allowed 0.1."""
    rng, promoted, trials = np.random.default_rng(1), 0, 150
    parsed = parse_rules({"rules": [SLICES]})
    for _ in range(trials):
        d = rng.random(400)
        in_slice = np.arange(400) % 4 == 3
        a = np.where(in_slice & (d < 0.05), 0.0, 1.0)
        b = np.where(in_slice & (d >= 0.05) & (d < 0.2), 0.0, 1.0)
        promoted += decide(parsed, comparison(rows(a, b))).verdict is Verdict.PROMOTE
    assert promoted / trials <= 0.05
