"""Compare two benchmarks: the ratio of each figure, second ÷ first, with a 95 % bootstrap interval.

Where both sent the same requests by the same plan, requests are drawn in pairs, which takes the differences between requests
out of the interval. Throughput is drawn in blocks of time: requests of one run wait for each other, and blocks keep that. Two
runs at different times also differ by what else the machine did; an interval knows nothing of that.

Boundary: two saved tables in, figures out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from workbench.bench.saved import BenchmarkRecord

DRAWS = 2_000
LEVEL = 0.95
NUM_BLOCKS = 20
_CELLS_AT_ONCE = 4_000_000
_STATISTICS: dict[str, Callable[..., Any]] = {
    "mean": np.mean,
    "p50": lambda values, axis: np.percentile(values, 50, axis=axis),
    "p95": lambda values, axis: np.percentile(values, 95, axis=axis),
}
LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")


def compare_benchmarks(
    first: tuple[BenchmarkRecord, pd.DataFrame],
    second: tuple[BenchmarkRecord, pd.DataFrame],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """``{"first", "second", "paired", "metrics": {name: {a, b, ratio, low, high, n_a, n_b, verdict}}, "differences"}``.

    `verdict`: "better" or "worse" of the second where its interval leaves 1 out, else "not proven". A figure that one of them
    does not have is left out.
    """
    (record_a, table_a), (record_b, table_b) = first, second
    generator = np.random.default_rng(seed)
    paired = record_a.plan_digest == record_b.plan_digest
    metrics: dict[str, Any] = {}
    for name in LATENCIES:
        a, b, shares_draws = _values(table_a, table_b, name, paired)
        if len(a) and len(b):
            for label, statistic in _STATISTICS.items():
                metrics[f"{name}_{label}"] = _ratio(
                    a, b, statistic, shares_draws, generator, lower_is_better=True
                )
    rates_a, rates_b = _block_rates(table_a), _block_rates(table_b)
    if rates_a.any() and rates_b.any():
        metrics["output_tokens_per_s"] = _throughput(record_a, record_b, rates_a, rates_b, generator)
    return {
        "first": record_a.id,
        "second": record_b.id,
        "paired": paired,
        "metrics": metrics,
        "differences": differences(record_a, record_b),
    }


def differences(a: BenchmarkRecord, b: BenchmarkRecord) -> dict[str, list[Any]]:
    """What besides the figures is not equal: configuration, target, machine, versions, commit. name -> [first, second]."""
    sides = [
        {f"{part}.{key}": value for part in ("spec", "target", "machine", "versions", "commit")
         for key, value in _part(record, part).items()}
        for record in (a, b)
    ]  # fmt: skip
    ignored = {"machine.load_1min", "target.url", "spec.name"}
    names = sorted((sides[0].keys() | sides[1].keys()) - ignored)
    return {
        name: [side.get(name) for side in sides] for name in names if sides[0].get(name) != sides[1].get(name)
    }


def _part(record: BenchmarkRecord, part: str) -> dict[str, Any]:
    return record.spec.as_dict() if part == "spec" else dict(getattr(record, part))


def _values(
    table_a: pd.DataFrame, table_b: pd.DataFrame, name: str, paired: bool
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The figure of each request that went well; in the same order when the plans are equal."""
    a, b = (table[table["error"].isna()].set_index("index")[name].dropna() for table in (table_a, table_b))
    if paired:
        shared = a.index.intersection(b.index)
        if len(shared):
            return a.loc[shared].to_numpy(float), b.loc[shared].to_numpy(float), True
    return a.to_numpy(float), b.to_numpy(float), False


def _ratio(
    a: np.ndarray,
    b: np.ndarray,
    statistic: Callable[..., Any],
    paired: bool,
    generator: np.random.Generator,
    *,
    lower_is_better: bool,
) -> dict[str, Any]:
    draws: list[np.ndarray] = []
    left = DRAWS
    while left > 0:
        count = min(left, max(_CELLS_AT_ONCE // max(len(a), len(b)), 1))
        picks_a = generator.integers(len(a), size=(count, len(a)))
        picks_b = picks_a if paired else generator.integers(len(b), size=(count, len(b)))
        draws.append(statistic(b[picks_b], axis=1) / np.maximum(statistic(a[picks_a], axis=1), 1e-12))
        left -= count
    value_a, value_b = float(statistic(a, axis=0)), float(statistic(b, axis=0))
    return _interval(value_a, value_b, np.concatenate(draws), len(a), len(b), lower_is_better)


def _throughput(
    record_a: BenchmarkRecord,
    record_b: BenchmarkRecord,
    rates_a: np.ndarray,
    rates_b: np.ndarray,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """Draws of whole blocks; the figures themselves are the reports' own."""
    picks = [generator.integers(NUM_BLOCKS, size=(DRAWS, NUM_BLOCKS)) for _ in range(2)]
    drawn = rates_b[picks[1]].mean(axis=1) / np.maximum(rates_a[picks[0]].mean(axis=1), 1e-12)
    value_a, value_b = (float(record.figures["output_tokens_per_s"]) for record in (record_a, record_b))
    return _interval(value_a, value_b, drawn, NUM_BLOCKS, NUM_BLOCKS, lower_is_better=False)


def _interval(
    value_a: float, value_b: float, draws: np.ndarray, n_a: int, n_b: int, lower_is_better: bool
) -> dict[str, Any]:
    low, high = (float(v) for v in np.percentile(draws, (50 * (1 - LEVEL), 100 - 50 * (1 - LEVEL))))
    verdict = "not proven"
    if low > 1 or high < 1:
        verdict = "better" if (high < 1) == lower_is_better else "worse"
    return {
        "a": value_a,
        "b": value_b,
        "ratio": value_b / value_a if value_a else None,
        "low": low,
        "high": high,
        "n_a": n_a,
        "n_b": n_b,
        "verdict": verdict,
    }


def _block_rates(requests: pd.DataFrame) -> np.ndarray:
    """Output tokens per second in each of equal blocks of the run, each request's tokens spread over its answer's time."""
    good = requests[requests["error"].isna()].dropna(subset=["ttft_ms", "e2e_ms", "output_tokens"])
    if not len(good):
        return np.zeros(NUM_BLOCKS)
    start, end = float(requests["sent_ms"].min()), float(requests["end_ms"].max())
    edges = np.linspace(start, end, NUM_BLOCKS + 1)
    began = (good["sent_ms"] + good["ttft_ms"]).to_numpy(float)[:, None]
    ended = np.maximum((good["sent_ms"] + good["e2e_ms"]).to_numpy(float)[:, None], began + 1e-6)
    inside = np.clip(np.minimum(ended, edges[1:]) - np.maximum(began, edges[:-1]), 0, None) / (ended - began)
    tokens = (inside * good["output_tokens"].to_numpy(float)[:, None]).sum(axis=0)
    return np.asarray(tokens / (edges[1] - edges[0]) * 1e3)
