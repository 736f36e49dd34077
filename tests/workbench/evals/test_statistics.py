"""Intervals, tests and power: against published values, other implementations, and what must hold whatever the data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from workbench.evals import statistics as s

DIFFERENCES = st.lists(
    st.floats(-1, 1, allow_nan=False).map(lambda v: round(v, 3)), min_size=1, max_size=40
).map(np.array)


def tango_by_root_finding(wins: int, losses: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Tango's limits from the constrained likelihood itself, maximised numerically: no shared formula."""
    z = stats.norm.ppf((1 + level) / 2)

    def statistic(difference: float) -> float:
        def minus_log_likelihood(losing: float) -> float:
            winning, same = losing + difference, 1 - 2 * losing - difference
            terms = ((wins, winning), (losses, losing), (n - wins - losses, same))
            return -sum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

        low, high = max(0.0, -difference), (1 - difference) / 2
        losing = optimize.minimize_scalar(
            minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
        ).x
        variance = n * (2 * losing + difference - difference**2)
        return (wins - losses - n * difference) / math.sqrt(variance)

    estimate = (wins - losses) / n
    low = optimize.brentq(lambda d: statistic(d) - z, -1 + 1e-9, estimate - 1e-9)
    high = optimize.brentq(lambda d: statistic(d) + z, estimate + 1e-9, 1 - 1e-9)
    return low, high


@pytest.mark.parametrize(
    ("wins", "losses", "n"), [(12, 3, 40), (1, 0, 30), (7, 1, 21), (43, 7, 500), (5, 5, 60), (29, 1, 30)]
)
def test_tango_limits_are_the_roots_of_the_score_equation(wins: int, losses: int, n: int) -> None:
    found = s.tango_interval(wins, losses, n)
    assert (found.low, found.high) == pytest.approx(tango_by_root_finding(wins, losses, n), abs=2e-5)


def test_interval_keeps_its_width_when_nothing_differs() -> None:
    z2 = stats.norm.ppf(0.975) ** 2
    for n in (1, 30, 400):
        found = s.paired_interval(np.zeros(n))
        assert found.estimate == 0
        assert found.high == pytest.approx(z2 / (n + z2))
        assert found.low == -found.high
        assert not found.excludes_zero


@given(st.integers(0, 25), st.integers(0, 25), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_bounded_score_interval_is_tangos_where_scores_are_right_or_wrong(
    wins: int, losses: int, ties: int
) -> None:
    x = np.array([1.0] * wins + [-1.0] * losses + [0.0] * ties)
    general, special = s.bounded_score_interval(x), s.tango_interval(wins, losses, len(x))
    assert (general.low, general.high) == pytest.approx((special.low, special.high), abs=1e-7)


@given(DIFFERENCES, st.sampled_from([1.0, None]))
@settings(max_examples=80, deadline=None)
def test_interval_holds_its_estimate_and_swapping_turns_it_around_exactly(
    x: np.ndarray, bound: float | None
) -> None:
    there = s.paired_interval(x, bound=bound, resamples=400)
    back = s.paired_interval(-x, bound=bound, resamples=400)
    assert back == there.negated()
    assert s.paired_p_value(x, resamples=400) == s.paired_p_value(-x, resamples=400)
    if there.low is None or there.high is None:
        assert (bound, len(x)) == (None, 1)
        return
    assert there.low <= there.estimate + 1e-12
    assert there.high >= there.estimate - 1e-12
    if bound is not None:
        assert -bound <= there.low
        assert there.high <= bound


def test_bca_agrees_with_scipy_on_many_examples() -> None:
    x = np.random.default_rng(5).gamma(0.6, size=400) - 0.4
    ours = s.bca_interval(x, resamples=20_000)
    theirs = stats.bootstrap(
        (x,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(9)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_degenerate_data_give_no_false_width() -> None:
    assert s.paired_interval(np.full(20, 0.25), bound=None).method == "all equal"
    one = s.paired_interval(np.array([0.5]), bound=None)
    assert (one.low, one.high, one.method) == (None, None, "too few")
    assert s.paired_interval(np.array([1.0])).high == pytest.approx(1.0)
    assert s.paired_p_value(np.full(3, 0.5)) == 0.25


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (9, 2), (40, 22), (300, 250), (3, 3)])
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert s.mcnemar_exact(wins, losses) == pytest.approx(expected)
    x = np.array([1.0] * wins + [-1.0] * losses)
    if wins + losses <= 12:
        assert s.sign_flip_p_value(x) == pytest.approx(expected)


def test_sign_flip_p_value_agrees_with_scipys_permutation_test() -> None:
    x = np.random.default_rng(3).normal(0.12, 0.4, 60)
    theirs = stats.permutation_test(
        (x, np.zeros(60)), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples",
        n_resamples=20_000, rng=np.random.default_rng(1), vectorized=True,
    ).pvalue  # fmt: skip
    assert s.sign_flip_p_value(x, resamples=20_000) == pytest.approx(theirs, abs=0.01)


def test_holm_matches_a_worked_example_and_keeps_order() -> None:
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert s.holm([]) == []
    assert s.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_raw_and_bonferroni(p_values: list[float]) -> None:
    for raw, adjusted in zip(p_values, s.holm(p_values), strict=True):
        assert raw <= adjusted + 1e-15
        assert adjusted <= min(1.0, raw * len(p_values)) + 1e-12 or adjusted <= 1.0


def test_t_quantiles_are_right() -> None:
    for degrees in (1, 2, 3, 5, 7, 29, 400):
        tolerance = 0.005 if degrees in (3, 4) else 0.001
        assert s.t_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=tolerance)


def test_examples_needed_and_detectable_effect_invert_each_other() -> None:
    x = np.random.default_rng(0).normal(0.1, 0.5, 300)
    effect = s.minimal_detectable_effect(x, bound=None)
    assert s.examples_needed(effect, x, bound=None) in (300, 301)
    assert s.examples_needed(0.0, x) is None
    assert s.examples_needed(-effect / 2, x, bound=None) == pytest.approx(1200, abs=4)


def test_block_bootstrap_turns_around_exactly_and_needs_two_blocks() -> None:
    generator = np.random.default_rng(0)
    a = [generator.gamma(5, size=8) for _ in range(6)]
    b = [block * 1.1 for block in a]
    there, back = s.block_bootstrap(a, b), s.block_bootstrap(b, a)
    assert back == there.negated()
    relative = s.block_bootstrap(a, b, relative=True)
    assert (relative.low, relative.estimate, relative.high) == pytest.approx((0.1, 0.1, 0.1))
    assert s.block_bootstrap(a[:1], b[:1]).low is None
