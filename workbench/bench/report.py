"""Report: figures of a benchmark, as a pure function of its table of requests.

The table is what is saved; page, notebook, command line and MLflow all call `figures` on it, so that they cannot disagree.
Percentiles are taken from raw values, linearly interpolated. Milliseconds; of requests that went well, unless it says so.

    ttft   request sent to first event that adds to the answer
    tpot   first token to last, divided by the tokens between (output tokens less one)
    itl    gaps between events of one answer, of all answers together; a server may put several tokens into an event
    e2e    request sent to last token
    output_tokens_per_s    output tokens of requests that went well, by the time from the first request sent to the last end

Boundary: arithmetic. Nothing is sent, saved or drawn here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.bench.driver import CANCELLED, ClientRecord
from workbench.bench.spec import Slo

if TYPE_CHECKING:
    import pandas as pd

NS_PER_MS = 1e6
METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
QUANTILES = (50, 95, 99)
LATE_MS = 10.0  # a generator's p99 lateness that is too much, unless answers take far longer
LATE_SHARE = 0.1  # of the median TTFT
COLUMNS = (
    "index", "request_id", "planned_ms", "sent_ms", "end_ms", "lateness_ms", "ttft_ms", "tpot_ms", "e2e_ms", "itl_ms",
    "input_tokens", "cached_tokens", "output_tokens", "asked_input_tokens", "asked_output_tokens", "finish_reason",
    "status", "error",
)  # fmt: skip


def request_table(records: Sequence[ClientRecord], began_ns: int) -> pd.DataFrame:
    """One row a request, in the order of the plan. `*_ms` without a duration's name count from `began_ns`."""
    import pandas as pd

    rows = [_row(record, began_ns) for record in sorted(records, key=lambda record: record.index)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def figures(
    requests: pd.DataFrame,
    *,
    slo: Mapping[str, float | None] | None = None,
    loop_lag_ms: Sequence[float] = (),
) -> dict[str, Any]:
    """What the table says, as plain JSON values; None where there is nothing to say it from."""
    ended = requests[requests["error"] != CANCELLED]
    good = ended[ended["error"].isna()]
    duration_s = _duration_s(requests)
    found: dict[str, Any] = {
        "num_requests": len(ended),
        "num_ok": len(good),
        "num_failed": len(ended) - len(good),
        "num_cancelled": len(requests) - len(ended),
        "errors": {
            str(reason): int(count) for reason, count in ended["error"].dropna().value_counts().items()
        },
        "duration_s": duration_s,
        "requests_per_s": _rate(len(good), duration_s),
        "input_tokens_per_s": _rate(good["input_tokens"].sum(), duration_s),
        "output_tokens_per_s": _rate(good["output_tokens"].sum(), duration_s),
    }
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        found[name] = distribution(good[name].dropna().to_numpy(float))
    found["itl_ms"] = distribution(_all_gaps(good))
    for name in ("input_tokens", "cached_tokens", "output_tokens"):
        found[name] = _extent(good[name].dropna().to_numpy(float))
    found["goodput"] = _goodput(good, len(ended), slo or {}, duration_s)
    found["generator"] = _generator(requests, loop_lag_ms, found["ttft_ms"]["p50"])
    return found


def live_figures(records: Sequence[ClientRecord], latest: int = 500) -> dict[str, Any]:
    """Figures of the newest requests while others run: a few of those of `figures`, cheap, without a table."""
    recent = [record for record in records[-latest:] if record.error is None]
    rows = [_row(record, 0) for record in recent]
    found: dict[str, Any] = {
        "num_requests": len(records),
        "num_failed": sum(record.error not in (None, CANCELLED) for record in records),
    }
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        found[name] = distribution(np.asarray([row[name] for row in rows if row[name] is not None], float))
    duration_s = (max(r.end_ns for r in recent) - min(r.sent_ns for r in recent)) / 1e9 if recent else None
    found["output_tokens_per_s"] = _rate(sum(row["output_tokens"] for row in rows), duration_s)
    return found


def distribution(values: np.ndarray) -> dict[str, float | None]:
    """Mean and percentiles of raw values."""
    if not len(values):
        return {"mean": None, **{f"p{q}": None for q in QUANTILES}}
    quantiles = np.percentile(values, QUANTILES)
    return {
        "mean": float(values.mean()),
        **{f"p{q}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
    }


def is_good(requests: pd.DataFrame, slo: Mapping[str, float | None]) -> np.ndarray:
    """Which requests went well and kept every limit of the objective."""
    kept = requests["error"].isna().to_numpy(bool).copy()
    for name in Slo.model_fields:
        limit = slo.get(name)
        if limit is not None:
            values = requests[name].to_numpy(float)
            alone = (name == "tpot_ms") & np.isnan(values)  # one token has no time per further token
            kept &= (values <= limit) | alone
    return kept


def _row(record: ClientRecord, began_ns: int) -> dict[str, Any]:
    def since_start(at_ns: int | None) -> float | None:
        return None if at_ns is None else (at_ns - began_ns) / NS_PER_MS

    first, last, tokens = record.first_ns, record.last_ns, record.num_output_tokens
    has_tpot = first is not None and last is not None and tokens is not None and tokens > 1
    return {
        "index": record.index,
        "request_id": record.request_id,
        "planned_ms": since_start(record.planned_ns),
        "sent_ms": since_start(record.sent_ns),
        "end_ms": since_start(record.end_ns),
        "lateness_ms": (record.sent_ns - record.ready_ns) / NS_PER_MS,
        "ttft_ms": None if first is None else (first - record.sent_ns) / NS_PER_MS,
        "tpot_ms": (last - first) / NS_PER_MS / (tokens - 1) if has_tpot else None,  # type: ignore[operator]
        "e2e_ms": None if last is None else (last - record.sent_ns) / NS_PER_MS,
        "itl_ms": (np.diff(np.asarray(record.event_ns, np.int64)) / NS_PER_MS).tolist(),
        "input_tokens": record.num_input_tokens,
        "cached_tokens": record.num_cached_tokens,
        "output_tokens": tokens,
        "asked_input_tokens": record.asked_input_tokens,
        "asked_output_tokens": record.asked_output_tokens,
        "finish_reason": record.finish_reason,
        "status": record.status,
        "error": record.error,
    }


def _duration_s(requests: pd.DataFrame) -> float | None:
    return float(requests["end_ms"].max() - requests["sent_ms"].min()) / 1e3 if len(requests) else None


def _rate(count: float, duration_s: float | None) -> float | None:
    return float(count) / duration_s if duration_s else None


def _all_gaps(requests: pd.DataFrame) -> np.ndarray:
    gaps = [np.asarray(each, float) for each in requests["itl_ms"] if len(each)]
    return np.concatenate(gaps) if gaps else np.empty(0)


def _extent(values: np.ndarray) -> dict[str, float | None]:
    if not len(values):
        return {"mean": None, "min": None, "max": None}
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}


def _goodput(
    good: pd.DataFrame, num_ended: int, slo: Mapping[str, float | None], duration_s: float | None
) -> dict[str, Any] | None:
    """How much of it kept the objective; failed requests did not. None without an objective."""
    limits = {name: limit for name, limit in slo.items() if limit is not None}
    if not limits:
        return None
    num_good = int(is_good(good, slo).sum())
    return {
        "slo": limits,
        "num_good": num_good,
        "share": num_good / num_ended if num_ended else None,
        "requests_per_s": _rate(num_good, duration_s),
    }


def _generator(
    requests: pd.DataFrame, loop_lag_ms: Sequence[float], ttft_p50: float | None
) -> dict[str, Any]:
    """Whether the load generator itself kept time."""
    lateness = requests["lateness_ms"].dropna().to_numpy(float)
    lag = np.asarray(loop_lag_ms, float)
    limit = max(LATE_MS, LATE_SHARE * (ttft_p50 or 0.0))
    late, lagging = distribution(lateness)["p99"], distribution(lag)["p99"]
    reasons = [
        f"{what} of the load generator was {value:.1f} ms at p99, more than {limit:.1f} ms"
        for what, value in (("the lateness", late), ("the event loop's lag", lagging))
        if value is not None and value > limit
    ]
    return {
        "lateness_ms": {**distribution(lateness), "max": float(lateness.max()) if len(lateness) else None},
        "loop_lag_ms": {**distribution(lag), "max": float(lag.max()) if len(lag) else None},
        "limit_ms": limit,
        "kept_time": not reasons,
        "message": "; ".join(reasons) + ": the figures are about the generator, too" if reasons else "",
    }
