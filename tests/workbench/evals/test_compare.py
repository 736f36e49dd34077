"""Evaluation and comparison: same requests for both, exact pairing, exact reversal, and nothing proven that is not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.evals import compare as comparing
from workbench.evals import errors
from workbench.evals.compare import Statistics, compare, compare_evaluations, compare_rows
from workbench.evals.datasets import Dataset
from workbench.evals.evaluate import EvaluationOptions, check_repeatable, evaluate, example_seed
from workbench.evals.report import Comparison, from_table, to_table
from workbench.evals.scorers import make_scorers
from workbench.evals.speed import SpeedOptions

Make = Callable[..., Any]
SCORERS = ["exact_match", "field_f1", "json_valid", "perplexity"]


def compared(backend: Any, a: str, b: str, dataset: Dataset, **options: Any) -> Comparison:
    return compare(
        backend, a, b, dataset, make_scorers(SCORERS), statistics=Statistics(resamples=500), **options
    )


@pytest.fixture
def three(table_backend: Make, answers: Make) -> Any:
    """v1 is wrong on every fourth, v2 on every twentieth, v3 as v1 but for one."""
    return table_backend(
        {
            "v1": answers(lambda i: i % 4 == 0),
            "v2": answers(lambda i: i % 20 == 0),
            "v3": answers(lambda i: i % 4 == 0 and i != 40),
        },
        ms_per_token={"v2": 2.0},
    )


def test_every_row_has_the_score_of_its_own_example(three: Any, make_sums: Make) -> None:
    found = compared(three, "v1", "v2", make_sums(60))
    assert found.n == 60
    for i, row in enumerate(found.rows):
        assert row.example_id == f"s{i:04}"
        assert row.scores_a["exact_match"] == (0 if i % 4 == 0 else 1)
        assert row.scores_b["exact_match"] == (0 if i % 20 == 0 else 1)
    metric = found.metrics["exact_match"]
    assert (metric.a, metric.b, metric.wins, metric.losses, metric.ties) == (0.75, 0.95, 12, 0, 48)
    assert metric.proven
    assert metric.outcome == "better"
    assert metric.diff == pytest.approx(0.2)
    assert metric.low is not None
    assert 0 < metric.low < 0.2


def test_divergence_is_that_of_the_answers_of_a(three: Any, make_sums: Make) -> None:
    found = compared(three, "v1", "v2", make_sums(30), divergence=True)
    apart = found.divergence
    assert apart is not None
    means = [row.output_a.count("2") * 0.25 / row.num_tokens_a for row in found.rows]
    assert (apart.n, apart.num_tokens) == (30, sum(row.num_tokens_a for row in found.rows))
    assert apart.mean_kl == pytest.approx(sum(means) / 30)
    assert apart.low is not None
    assert apart.high is not None
    assert apart.low < apart.mean_kl < apart.high
    assert apart.max_kl == 0.25, "the request's own tokens do not count"
    same = sum(row.num_tokens_a - row.output_a.count("2") for row in found.rows)
    assert apart.same_top == pytest.approx(same / apart.num_tokens)
    assert [kl for _, kl in apart.worst] == sorted(means, reverse=True)[:5]
    assert found.to_dict()["divergence"]["n"] == 30
    assert len(three.models()) == 0, "what was loaded is given back"
    again = compared(three, "v1", "v1", make_sums(30), divergence=True).divergence
    assert again is not None
    assert (again.mean_kl, again.max_kl, again.same_top) == (0.0, 0.0, 1.0)
    assert compared(three, "v1", "v2", make_sums(6)).divergence is None


def test_swapping_the_versions_flips_every_sign_exactly(three: Any, make_sums: Make) -> None:
    there = compared(three, "v1", "v2", make_sums(60), speed=SpeedOptions(pairs=3, max_pairs=3, requests=2))
    back = compared(three, "v2", "v1", make_sums(60), speed=SpeedOptions(pairs=3, max_pairs=3, requests=2))
    pairs = [*zip(there.metrics.values(), back.metrics.values(), strict=True)]
    pairs += [*zip(there.slices, back.slices, strict=True)]
    assert len(pairs) > 8
    for one, other in pairs:
        assert one.name == other.name
        assert one.diff == -other.diff
        assert (one.low, one.high) == (-other.high, -other.low)
        assert (one.p_value, one.p_adjusted, one.proven) == (other.p_value, other.p_adjusted, other.proven)
        assert (one.wins, one.losses) == (other.losses, other.wins)
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        assert there.speed[name].diff == -back.speed[name].diff
        assert there.speed[name].low == -back.speed[name].high


def test_a_version_against_itself_is_zero_on_every_row_in_other_batches(three: Any, make_sums: Make) -> None:
    found = compared(three, "v1", "v1", make_sums(60))
    assert [load for load in three.loads if load[1]] == [("v1", True), ("v1", True)]
    assert three.unloads == ["v1#deterministic", "v1#deterministic"]  # loaded anew for the second time
    assert len({concurrency for _, _, concurrency in three.calls}) >= 2
    for row in found.rows:
        assert row.output_a == row.output_b
        assert row.scores_a == row.scores_b
    for metric in [*found.metrics.values(), *found.slices]:
        assert metric.diff == 0
        assert (metric.wins, metric.losses) == (0, 0)
        assert not metric.proven
        assert metric.p_value == 1
        assert metric.low == -metric.high


def test_perplexity_is_of_the_expected_answer_alone_and_lower_is_better(three: Any, make_sums: Make) -> None:
    found = compared(three, "v1", "v2", make_sums(60)).rows[3]
    tokens = list(b'{"sum":6}')
    wanted = math.exp(sum((token % 10) / 4 for token in tokens) / len(tokens))
    assert found.scores_a["perplexity"] == pytest.approx(wanted)


def test_requests_are_the_same_for_both_versions_whatever_their_order(
    table_backend: Make, make_sums: Make
) -> None:
    asked: dict[str, dict[str, int]] = {"a": {}, "b": {}}

    def recorder(name: str) -> Any:
        def answer(question: str, seed: int) -> str:
            asked[name][question] = seed
            return "{}"

        return answer

    backend = table_backend({name: recorder(name) for name in asked})
    dataset = make_sums(40)
    for name, options in (("a", EvaluationOptions(seed=5)), ("b", EvaluationOptions(seed=5, order_seed=3))):
        rows = evaluate(backend, backend.load(name), dataset, [], options).rows
        assert [row.example_id for row in rows] == [e.id for e in dataset.examples]
    assert asked["a"] == asked["b"]
    assert list(asked["a"]) != list(asked["b"])
    assert asked["a"]["3 + 3"] == example_seed(5, "s0003") != example_seed(6, "s0003")


def test_an_engine_that_is_not_repeatable_is_found_out(table_backend: Make, make_sums: Make) -> None:
    state = {"calls": 0}

    def unsteady(question: str, _seed: int) -> str:
        state["calls"] += 1
        return "{}" if question != "4 + 4" else f'{{"n": {state["calls"]}}}'

    backend = table_backend({"u": unsteady})
    done = evaluate(backend, backend.load("u"), make_sums(10), make_scorers(["json_valid"]))
    found = check_repeatable(backend, done, requests=10)
    assert not found.proven
    assert (found.checked, found.equal, found.differing) == (10, 9, ("s0004",))


def test_a_failed_request_ends_the_evaluation_by_name(three: Any, make_sums: Make) -> None:
    three.fail = "7 + 7"
    with pytest.raises(errors.RequestsFailedError, match=r"1 of 60 requests .* \(s0007\): the step failed"):
        compared(three, "v1", "v2", make_sums(60))
    assert three.models() == []  # given back all the same


def test_a_scorer_that_does_not_fit_stops_before_anything_is_loaded(three: Any, write_dataset: Make) -> None:
    from workbench.evals.datasets import load_dataset

    path: Path = write_dataset(
        [{"id": "a", "messages": [{"role": "user", "content": "1 + 1"}], "expected": "2"}]
    )
    with pytest.raises(errors.ScorerError):
        compare(three, "v1", "v2", load_dataset(path), make_scorers(["field_f1"]))
    assert three.loads == []


def test_evaluations_of_other_requests_are_not_compared(three: Any, make_sums: Make) -> None:
    one = evaluate(three, three.load("v1"), make_sums(20), make_scorers(["json_valid"]))
    two = evaluate(three, three.load("v2"), make_sums(21), make_scorers(["json_valid"]))
    with pytest.raises(errors.CompareSpecError, match="different datasets"):
        compare_evaluations(one, two)


def test_slices_have_their_own_intervals_and_holm_over_their_tag(
    table_backend: Make, answers: Make, make_sums: Make
) -> None:
    """B loses a part of one slice and wins a part of another: overall nothing is proven, the slices are."""
    backend = table_backend(
        {"a": answers(lambda i: i % 4 == 1 and i % 8 == 1), "b": answers(lambda i: i % 4 == 2 and i % 8 == 2)}
    )
    found = compared(backend, "a", "b", make_sums(400, slices=4))
    assert not found.metrics["exact_match"].proven
    slices = {s.slice: s for s in found.slices if s.name == "exact_match"}
    assert {name: s.outcome for name, s in slices.items()} == {
        "slice=part0": "not proven", "slice=part1": "better", "slice=part2": "worse", "slice=part3": "not proven",
    }  # fmt: skip
    for s in slices.values():
        assert s.n == 100
        assert s.p_adjusted >= s.p_value


def test_rows_that_one_version_was_not_scored_on_count_for_neither(three: Any, make_sums: Make) -> None:
    found = compared(three, "v1", "v2", make_sums(60))
    table = to_table(found.rows, list(found.metrics))
    table.loc[0:9, "exact_match_b"] = None
    metrics, _ = compare_rows(from_table(table), make_sums_metrics(), Statistics(resamples=500))
    assert metrics["exact_match"].n == 50
    assert metrics["json_valid"].n == 60


def make_sums_metrics() -> list[Any]:
    return [scorer.metric for scorer in make_scorers(SCORERS)]


def test_speed_runs_each_version_alone_in_alternating_blocks(three: Any, make_sums: Make) -> None:
    found = compared(three, "v1", "v2", make_sums(60), speed=SpeedOptions(pairs=4, requests=3, concurrency=2))
    order = [(row.pair, row.version) for row in found.speed_rows]
    assert list(dict.fromkeys(order)) == [
        (0, "a"),
        (0, "b"),
        (1, "b"),
        (1, "a"),
        (2, "a"),
        (2, "b"),
        (3, "b"),
        (3, "a"),
    ]
    assert len(order) == 4 * 2 * 3
    for pair in range(4):
        asked = [{r.example_id for r in found.speed_rows if (r.pair, r.version) == (pair, v)} for v in "ab"]
        assert asked[0] == asked[1]
    tpot = found.speed["tpot_ms"]
    assert (tpot.a, tpot.b, tpot.diff, tpot.percent, tpot.n) == (1.0, 2.0, 1.0, 100.0, 4)
    assert (tpot.percent_low, tpot.percent_high) == pytest.approx((100.0, 100.0))
    assert {row.output_tokens for row in found.speed_rows} == {SpeedOptions().max_tokens}


def test_a_noisy_machine_gets_more_pairs_and_a_quiet_one_does_not(
    table_backend: Make, answers: Make, make_sums: Make
) -> None:
    noise = iter(range(10_000))

    class Noisy(table_backend):  # type: ignore[misc,valid-type]
        def chat(self, *args: Any, **kwargs: Any) -> Any:
            self.ms_per_token = {"v1": 1.0 + (next(noise) * 7919 % 13) / 10, "v2": 1.0}
            return super().chat(*args, **kwargs)

    options = SpeedOptions(pairs=4, max_pairs=12, requests=2)
    versions = {name: answers() for name in ("v1", "v2")}
    for kind, pairs in ((table_backend, 4), (Noisy, 12)):
        found = compared(kind(versions), "v1", "v2", make_sums(60), speed=options)
        assert found.speed["tpot_ms"].n == pairs
        assert len(found.speed_rows) == pairs * 2 * 2


def test_cancelling_gives_the_versions_back(three: Any, make_sums: Make) -> None:
    class Cancelled(Exception):
        pass

    def cancel() -> None:
        if len(three.calls) >= 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        compare(
            three, "v1", "v2", make_sums(60), make_scorers(["json_valid"]),
            options=EvaluationOptions(max_concurrency=2), check_cancelled=cancel,
        )  # fmt: skip
    assert three.models() == []


def test_what_was_resident_before_stays(three: Any, make_sums: Make) -> None:
    three.load("v1", deterministic=True)
    compared(three, "v1", "v2", make_sums(20))
    assert three.models() == ["v1#deterministic"]
    assert comparing.MIN_SLICE == 5
