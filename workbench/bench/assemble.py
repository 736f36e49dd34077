"""The record of a benchmark, put together from its parts: spec, target, figures, machine, versions, commit.

Boundary: values. Nothing is measured, sent or written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.bench.record import make_record
from workbench.bench import saved
from workbench.bench.driver import DriverResult
from workbench.bench.engine_side import agreement
from workbench.bench.report import figures
from workbench.bench.saved import BenchmarkRecord
from workbench.bench.spec import BenchmarkSpec
from workbench.bench.target import Target
from workbench.bench.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

    from engine.records import EngineStats

MAX_LAGS = 500


def notes_of(spec: BenchmarkSpec, target: Target, workload: Workload, *, has_records: bool) -> list[str]:
    """What a reader of the figures must know beforehand."""
    notes = []
    if workload.forced_length and not target.forces_length:
        notes.append("This server ends answers by itself: output lengths are at most what was asked for.")
    if not has_records:
        notes.append("The server's own records cannot be read: no share of the limit, no agreement check.")
    if spec.trace is not None and len(workload.measured) < spec.requests:
        notes.append(f"The trace has {len(workload.measured)} requests, fewer than asked for.")
    return notes


def assemble(
    spec: BenchmarkSpec,
    target: Target,
    workload: Workload,
    result: DriverResult,
    requests: pd.DataFrame,
    stats: EngineStats | None,
    engine: dict[str, Any] | None,
    notes: list[str],
) -> BenchmarkRecord:
    """The record of a run, with its figures, and with what they depend on besides the code."""
    facts = make_record("benchmark", {})
    lag = _thinned(result.loop_lag_ms)
    found = figures(requests, slo=spec.slo.model_dump(), loop_lag_ms=lag)
    if not found["generator"]["kept_time"]:
        notes = [*notes, found["generator"]["message"]]
    told = {"url": target.base_url, "model": target.model, "max_model_len": target.max_model_len}
    if stats is not None:
        told |= {key: value for key, value in asdict(stats).items() if key in _STATS}
    return BenchmarkRecord(
        id=saved.new_id(),
        at=facts["at"],
        title=spec.title,
        spec=spec,
        cancelled=result.cancelled,
        target=told,
        plan_digest=workload.digest,
        offered_rps=workload.offered_rps,
        forced_length=workload.forced_length and target.forces_length,
        figures=found,
        loop_lag_ms=lag,
        engine=engine,
        agreement=agreement(requests),
        notes=notes,
        machine=facts["machine"],
        versions=facts["versions"],
        commit=facts["commit"],
    )


def _thinned(lag_ms: Sequence[float]) -> list[float]:
    """At most MAX_LAGS values with the same distribution: records are listed by the thousand."""
    values = np.asarray(lag_ms, float)
    if len(values) > MAX_LAGS:
        values = np.quantile(values, np.linspace(0.0, 1.0, MAX_LAGS))
    return [round(float(value), 4) for value in values]


_STATS = (
    "version_digest", "num_blocks", "block_size", "max_num_seqs", "max_model_len", "max_batched_tokens", "dtype",
    "device", "kv_cache_dtype", "attention_backend", "deterministic",
)  # fmt: skip
