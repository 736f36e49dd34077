"""Statistics of a paired comparison: which interval, which test, how small a difference could be seen.

    paired_interval              Tango's score interval for right/wrong scores and for sparse differences of bounded scores,
                                 BCa bootstrap for everything else
    paired_p_value               exact McNemar for right/wrong scores, sign-flip permutation test for everything else
    holm                         p-values of many slices, controlled together
    minimal_detectable_effect    the difference that this many examples would prove, at a given power
    examples_needed              how many examples would prove a given difference
    block_bootstrap              speed, measured in alternating blocks

Why not BCa throughout: with n = 30 and one example in a hundred that differs, three samples in four hold no difference at all,
and every bootstrap of such a sample is the point 0. A score with known bounds says more: what was not seen in 30 examples can
still be in one of nine. Measured coverage of both is in tests/workbench/evals/test_coverage.py.

Boundary: numbers in, numbers out. Nothing here knows of metrics, versions or slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from workbench.evals.intervals import (
    CONFIDENCE,
    RESAMPLES,
    Floats,
    Interval,
    bca_interval,
    block_bootstrap,
    bootstrap_means,
    bounded_score_interval,
    normal_cdf,
    normal_quantile,
    t_quantile,
    tango_interval,
    tango_limits,
)

__all__ = [
    "CONFIDENCE", "MIN_DIFFERENT_FOR_BCA", "POWER", "RESAMPLES", "Interval", "bca_interval", "block_bootstrap", "bootstrap_means",
    "bounded_score_interval", "examples_needed", "holm", "is_binary", "mcnemar_exact", "minimal_detectable_effect",
    "normal_cdf", "paired_interval", "paired_p_value", "sign_flip_p_value", "spread", "t_quantile", "tango_interval",
    "tango_limits",
]  # fmt: skip

POWER = 0.8
MIN_DIFFERENT_FOR_BCA = 50  # non-zero differences below which a bounded score gets the score interval
_EXACT_FLIPS = 12  # up to this many non-zero differences all sign patterns are counted


def paired_interval(
    differences: ArrayLike,
    *,
    bound: float | None = 1.0,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Confidence interval of the mean of paired differences, by the method that fits them.

    `bound`: the largest difference that the score allows, 1 for scores between 0 and 1; None for unbounded scores.
    """
    x = np.asarray(differences, np.float64)
    assert x.ndim == 1, x.shape
    assert len(x), "no differences"
    if bound is None:
        return bca_interval(x, confidence, resamples, seed)
    if is_binary(x, bound):
        interval = tango_interval(int((x > 0).sum()), int((x < 0).sum()), len(x), confidence)
        return interval if bound == 1.0 else _scaled(interval, bound)
    if int((x != 0).sum()) < MIN_DIFFERENT_FOR_BCA:
        return bounded_score_interval(x, bound, confidence)
    return bca_interval(x, confidence, resamples, seed)


def paired_p_value(differences: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of "A and B are alike": exact McNemar where differences are 0 or ± one value, else sign flips."""
    x = np.asarray(differences, np.float64)
    different = x[x != 0]
    if len(different) == 0:
        return 1.0
    if np.all(np.abs(different) == np.abs(different[0])):
        return mcnemar_exact(int((x > 0).sum()), int((x < 0).sum()))
    return sign_flip_p_value(x, seed=seed, resamples=resamples)


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact McNemar test: of the pairs that differ, each is as likely a win as a loss.

    Source: McNemar, Psychometrika 12 (1947) 153-157, with the binomial distribution.
    """
    total, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**total))


def sign_flip_p_value(differences: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided permutation test of paired differences: how often random signs give a mean as far from 0.

    Exact up to 12 non-zero differences, else from `resamples` random sign patterns (the data's own counted in).
    Source: Pitman (1937); Phipson and Smyth, arXiv:1603.05766, for counting the data's own pattern.
    """
    x = np.asarray(differences, np.float64)
    sizes = np.abs(x[x != 0])
    observed = abs(float(x.sum())) * (1 - 1e-12)
    if len(sizes) == 0:
        return 1.0
    if len(sizes) <= _EXACT_FLIPS:
        patterns = (np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes))) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ sizes) >= observed))
    generator = np.random.default_rng(seed)
    hits = 0
    for start in range(0, resamples, 1000):
        flips = generator.integers(0, 2, (min(1000, resamples - start), len(sizes)), dtype=np.int8)
        hits += int(np.sum(np.abs((2.0 * flips - 1.0) @ sizes) >= observed))
    return (hits + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the given order: any of them at most α keeps the chance of one false finding at most α.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def minimal_detectable_effect(
    differences: ArrayLike,
    *,
    bound: float | None = 1.0,
    confidence: float = CONFIDENCE,
    power: float = POWER,
) -> float:
    """The true difference that a comparison of this size proves with probability `power`, given how much examples scatter."""
    x = np.asarray(differences, np.float64)
    return _reach(confidence, power) * spread(x, bound) / math.sqrt(len(x))


def examples_needed(
    effect: float,
    differences: ArrayLike,
    *,
    bound: float | None = 1.0,
    confidence: float = CONFIDENCE,
    power: float = POWER,
) -> int | None:
    """How many examples like these would prove a true difference of `effect`; None when no number would (no effect)."""
    deviation = spread(np.asarray(differences, np.float64), bound)
    if effect == 0 or deviation == 0:
        return None
    return max(2, math.ceil((_reach(confidence, power) * deviation / abs(effect)) ** 2))


def spread(differences: Floats, bound: float | None = 1.0) -> float:
    """Standard deviation of the differences; a bounded score with few of them counts one unseen win and one unseen loss.

    Source of the two pseudo-observations: Bonett and Price, Journal of Educational and Behavioral Statistics 37 (2012) 479-488.
    """
    x = differences
    if bound is not None and int((x != 0).sum()) < MIN_DIFFERENT_FOR_BCA:
        x = np.concatenate([x, [bound, -bound]])
    return float(x.std(ddof=1)) if len(x) > 1 else math.inf


def is_binary(differences: Floats, bound: float = 1.0) -> bool:
    """All differences are a whole loss, nothing, or a whole win."""
    return bool(np.all((differences == 0) | (np.abs(differences) == bound)))


def _reach(confidence: float, power: float) -> float:
    return normal_quantile((1 + confidence) / 2) + normal_quantile(power)


def _scaled(interval: Interval, factor: float) -> Interval:
    assert interval.low is not None
    assert interval.high is not None
    return Interval(
        interval.estimate * factor,
        interval.low * factor,
        interval.high * factor,
        interval.method,
        interval.confidence,
    )
