"""Coverage: how often the intervals hold the truth, by exact enumeration and by simulation; and how wide they are for it.

Right/wrong scores are enumerated exactly (every outcome with its probability), so their figures carry no noise. The long proofs
(``-m full``) draw samples and call the very functions that comparisons call.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from workbench.evals import statistics as s

SIZES, DISCORDANCES = (30, 100, 500), (0.01, 0.1, 0.4)
GRID = [(n, rate) for n in SIZES for rate in DISCORDANCES]
# Where a coverage of 93-97 % is out of every interval's reach (proved below): hardly any example differs.
TOO_DISCRETE = {(30, 0.01), (100, 0.01)}
Array = np.ndarray


def outcomes(n: int, rate: float, share: float = 0.5) -> tuple[Array, Array, Array]:
    """Wins, losses and probability of every outcome that matters; `share` of the differing examples are wins."""
    most = min(n, int(n * rate + 9 * math.sqrt(n * rate) + 12))
    wins, losses = (a.ravel() for a in np.meshgrid(np.arange(most + 1), np.arange(most + 1)))
    inside = wins + losses <= most
    wins, losses = wins[inside], losses[inside]
    rates = (rate * share, rate * (1 - share), 1 - rate)
    counts = (wins, losses, n - wins - losses)
    log = np.full(len(wins), math.lgamma(n + 1))
    gamma = np.array([math.lgamma(k + 1) for k in range(n + 1)])
    for count, p in zip(counts, rates, strict=True):
        log -= gamma[count]
        log += count * math.log(p) if p else np.where(count, -np.inf, 0.0)
    return wins, losses, np.exp(log)


def exact_coverage(n: int, rate: float, share: float = 0.5) -> tuple[float, float]:
    """Coverage and mean width of the interval for right/wrong scores."""
    wins, losses, p = outcomes(n, rate, share)
    assert p.sum() == pytest.approx(1, abs=1e-6)
    low, high = s.tango_limits(wins, losses, n)
    truth = rate * share - rate * (1 - share)
    return float(p @ ((low <= truth) & (truth <= high))), float(p @ (high - low))


@pytest.mark.parametrize(("n", "rate"), GRID)
def test_right_wrong_intervals_cover_95_percent(n: int, rate: float) -> None:
    """Exact coverage at no true difference: 93-97 %, and above 97 % only where nothing else is possible."""
    coverage, width = exact_coverage(n, rate)
    assert coverage >= 0.93
    assert coverage <= 0.97 or (n, rate) in TOO_DISCRETE
    ideal = 2 * 1.96 * math.sqrt(rate / n)  # of somebody who knows how many examples differ
    floor = 2 * 1.96**2 / (n + 1.96**2)  # where nothing differs: ± one example in n / 3.84
    assert width <= 1.05 * math.hypot(ideal, floor)  # not vacuous


@pytest.mark.parametrize(("n", "rate"), [cell for cell in GRID if cell not in TOO_DISCRETE])
@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_right_wrong_intervals_cover_a_true_difference(n: int, rate: float, share: float) -> None:
    """Exact coverage when B wins more often than it loses: never far below 95 %, and near it once enough examples differ."""
    coverage, _ = exact_coverage(n, rate, share)
    assert coverage >= 0.93
    if n * rate >= 5:
        assert coverage <= 0.97


@pytest.mark.parametrize(("n", "rate"), sorted(TOO_DISCRETE))
def test_no_interval_covers_93_to_97_percent_where_hardly_anything_differs(n: int, rate: float) -> None:
    """Whatever the interval: if swapping A and B turns it around, and more wins do not make 0 more plausible.

    Such an interval is, for the question "does it hold 0", a set of (wins, losses) that is symmetric, holds every draw, and with
    a pair holds every pair of the same total that is more even, and every pair with fewer wins and as many losses. All those
    sets are tried, for up to four differing examples; what may follow is less likely than 0.4 % and is given either way.
    """
    wins, losses, p = outcomes(n, rate)
    chance = {(int(b), int(c)): float(q) for b, c, q in zip(wins, losses, p, strict=True)}
    beyond = sum(q for (b, c), q in chance.items() if b + c > 4)
    assert beyond < 0.004
    uneven = [(b, c) for b in range(1, 5) for c in range(b) if b + c <= 4]
    draws = sum(q for (b, c), q in chance.items() if b == c and b + c <= 4)
    seen = set()
    for bits in range(2 ** len(uneven)):
        held = {pair for i, pair in enumerate(uneven) if bits >> i & 1}
        consistent = all(
            ((b - 1, c) in held or b - 1 <= c) and ((b - 1, c + 1) in held or b - 1 <= c + 1) for b, c in held
        )
        if consistent:
            covered = draws + sum(2 * chance[pair] for pair in held)
            seen.add(round(covered, 4))
            assert covered + beyond < 0.93 or covered > 0.97, (held, covered)
    assert len(seen) > 3


def sparse_differences(
    rng: np.random.Generator, trials: int, n: int, rate: float, kind: str
) -> tuple[Array, float]:
    """Differences of a score like F1, `rate` of them not 0; and their true mean."""
    if kind == "fields":  # sevenths, as F1 over seven fields moves
        sizes, weights = np.arange(1, 8) / 7, np.array([0.35, 0.2, 0.12, 0.08, 0.05, 0.05, 0.15])
        values, mean = rng.choice(sizes, (trials, n), p=weights), float(sizes @ weights)
    else:  # anything between 0 and 1
        values, mean = rng.beta(2, 3, (trials, n)), 0.4
    wins = rng.random((trials, n)) < 0.75
    return np.where(rng.random((trials, n)) < rate, np.where(wins, values, -values), 0.0), rate * mean * 0.5


def continuous_coverage(n: int, rate: float, kind: str, trials: int, resamples: int) -> tuple[float, float]:
    rng = np.random.default_rng([n, int(rate * 1000), len(kind)])
    samples, truth = sparse_differences(rng, trials, n, rate, kind)
    found = [s.paired_interval(x, resamples=resamples, seed=i) for i, x in enumerate(samples)]
    held = [i.low <= truth <= i.high for i in found if i.low is not None and i.high is not None]
    widths = [i.high - i.low for i in found if i.low is not None and i.high is not None]
    assert len(held) == trials
    return float(np.mean(held)), float(np.mean(widths))


@pytest.mark.parametrize(("n", "rate"), [(30, 0.4), (100, 0.1), (500, 0.1)])
def test_intervals_of_continuous_scores_cover_the_truth(n: int, rate: float) -> None:
    coverage, width = continuous_coverage(n, rate, "fields", 120, 300)
    assert 0.88 <= coverage <= 1.0  # 120 samples: ± 4 %; the full grid is exact to ± 1 %
    assert width <= 8 * math.sqrt(rate / n)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["fields", "any"])
@pytest.mark.parametrize(("n", "rate"), GRID)
def test_full_grid_of_continuous_scores(n: int, rate: float, kind: str) -> None:
    """93-97 % where at least ten examples can be expected to differ, never below 93 %: with fewer, the interval stays wide."""
    coverage, width = continuous_coverage(n, rate, kind, 2000, 1000)
    noise = 2.5 * math.sqrt(0.05 * 0.95 / 2000)
    assert coverage >= 0.93 - noise
    if n * rate >= 10:
        assert coverage <= 0.97 + noise
    floor = 2 * 1.96**2 / (n + 1.96**2)
    assert width <= 1.3 * math.hypot(2 * 1.96 * math.sqrt(rate / n), floor)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["normal", "skewed"])
@pytest.mark.parametrize("n", SIZES)
def test_full_grid_of_unbounded_scores(n: int, kind: str) -> None:
    """BCa on differences as perplexity gives them: all differ. Skewed ones need more than 30 examples."""
    rng = np.random.default_rng(n)
    draw = rng.normal(0.1, 1.0, (2000, n)) if kind == "normal" else rng.gamma(2.0, 1.0, (2000, n)) - 1.5
    truth = 0.1 if kind == "normal" else 0.5
    found = [s.paired_interval(x, bound=None, resamples=1000, seed=i) for i, x in enumerate(draw)]
    coverage = np.mean([i.low <= truth <= i.high for i in found if i.low is not None and i.high is not None])
    noise = 2.5 * math.sqrt(0.05 * 0.95 / 2000)
    assert 0.93 - noise <= coverage <= 0.97 + noise


@pytest.mark.full
@pytest.mark.parametrize(("n", "rate"), GRID)
def test_full_grid_of_right_wrong_scores_by_simulation(n: int, rate: float) -> None:
    """The same coverage as enumerated, from samples through the function that comparisons call."""
    rng = np.random.default_rng([n, int(rate * 1000)])
    trials = 4000
    different = rng.random((trials, n)) < rate
    samples = np.where(different, rng.choice([-1.0, 1.0], (trials, n)), 0.0)
    cache: dict[tuple[int, int], s.Interval] = {}
    held = 0
    for x in samples:
        key = int((x > 0).sum()), int((x < 0).sum())
        interval = cache.setdefault(key, cache.get(key) or s.paired_interval(x))
        assert interval.low is not None
        assert interval.high is not None
        held += interval.low <= 0 <= interval.high
    assert held / trials == pytest.approx(exact_coverage(n, rate)[0], abs=0.012)


def test_detectable_effect_is_detected_four_times_in_five() -> None:
    """At the minimal detectable effect, McNemar's and the interval's verdict come in 80 % of samples (exact enumeration)."""
    n, rate = 400, 0.12
    sample = np.array([1.0] * 24 + [-1.0] * 24 + [0.0] * 352)
    effect = s.minimal_detectable_effect(sample)
    wins, losses, p = outcomes(n, rate, 0.5 + effect / (2 * rate))
    low, _ = s.tango_limits(wins, losses, n)
    assert float(p @ (low > 0)) == pytest.approx(0.8, abs=0.04)


def block_series(rng: np.random.Generator, pairs: int, requests: int) -> tuple[list[Array], list[Array]]:
    """Latencies of two equal versions on a machine that drifts, with blocks that have good and bad luck."""
    drift = np.cumsum(rng.normal(0, 0.3, pairs))
    a, b = (
        [10 + drift[i] + rng.normal(0, 0.4) + rng.gamma(2, 0.5, requests) for i in range(pairs)] for _ in "ab"
    )
    return a, b


@pytest.mark.parametrize("pairs", [8, pytest.param(20, marks=pytest.mark.full)])
def test_block_bootstrap_covers_under_drift_where_single_requests_do_not(pairs: int) -> None:
    rng, trials = np.random.default_rng(pairs), 400
    held = naive = 0
    for trial in range(trials):
        a, b = block_series(rng, pairs, 8)
        interval = s.block_bootstrap(a, b, resamples=500, seed=trial)
        assert interval.low is not None
        assert interval.high is not None
        held += interval.low <= 0 <= interval.high
        gap = np.concatenate(b).mean() - np.concatenate(a).mean()
        error = math.sqrt((np.concatenate(a).var() + np.concatenate(b).var()) / (8 * pairs))
        naive += abs(gap) <= 1.96 * error
    assert 0.91 <= held / trials <= 0.985
    assert naive < 0.9 * trials  # the interval that takes requests for independent is far too narrow


def test_holm_keeps_false_findings_over_slices_at_five_percent() -> None:
    """Ten slices without any difference: at least one of them is called different in at most 5 % of comparisons."""
    rng, trials, found = np.random.default_rng(0), 1500, 0
    for _ in range(trials):
        wins = rng.binomial(50, 0.1, 10)
        losses = np.array([rng.binomial(50 - w, 0.1 / 0.9) for w in wins])
        p_values = [s.mcnemar_exact(int(w), int(lost)) for w, lost in zip(wins, losses, strict=True)]
        found += min(s.holm(p_values)) <= 0.05
    assert found / trials <= 0.05


@pytest.mark.parametrize("loss", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("n", [30, 60, 100, 400])
def test_a_version_that_is_worse_by_the_allowed_loss_passes_in_three_of_hundred(n: int, loss: float) -> None:
    """Exactly, whatever share of the examples differs: what a `not_worse` rule promises."""
    for rate in (loss, 1.2 * loss, 2 * loss, 0.2, 0.4):
        wins, losses, p = outcomes(n, rate, (1 - loss / rate) / 2)
        low, _ = s.tango_limits(wins, losses, n)
        assert float(p @ (low > -loss)) <= 0.03
