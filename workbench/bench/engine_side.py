"""The engine's side of a benchmark: its own records of the same requests and of the steps that served them.

For an engine on this machine only: its records are monotonic times, which mean nothing elsewhere. Records are collected while
the benchmark runs where it outlasts the engine's memory, so that no step is lost; step numbers prove it.

Boundary: reads records, makes figures. The load is `driver`'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.limits import Limits, StepArrays, spent
from workbench.bench.report import NS_PER_MS, distribution

if TYPE_CHECKING:
    import pandas as pd

    from engine.records import RequestRecord
    from workbench.backends.codec import StepSummary
    from workbench.backends.protocol import Backend

COLLECT_EVERY_S = 120.0  # well within what an engine remembers by default
AGREEMENT = ("ttft_ms", "tpot_ms", "e2e_ms")


class EngineSide:
    """Collects an engine's records of one benchmark."""

    def __init__(self, backend: Backend, model: str) -> None:
        self._backend = backend
        self._model = model
        self._began_ns = self._since_ns = time.monotonic_ns()
        self._steps: dict[int, StepSummary] = {}
        self._requests: dict[str, RequestRecord] = {}

    def begin(self) -> None:
        """Records from now on are collected."""
        self._began_ns = self._since_ns = time.monotonic_ns()

    def begin_at(self, began_ns: int) -> None:
        """Steps before that moment do not count: the warm-up's."""
        self._began_ns = began_ns

    def collect_if_due(self) -> None:
        """Collect when it has been long; between times it costs nothing, so that the run is left alone."""
        if time.monotonic_ns() - self._since_ns > COLLECT_EVERY_S * 1e9:
            self.collect()

    def collect(self) -> None:
        """Take the records since the last time. Raises BackendError."""
        now = time.monotonic_ns()
        records = self._backend.records(self._model, self._since_ns)
        self._since_ns = now
        self._steps |= {step.step_id: step for step in records.steps}
        self._requests |= {request.request_id: request for request in records.requests}

    @property
    def steps(self) -> list[StepSummary]:
        """Steps since `begin`, oldest first."""
        return [step for _, step in sorted(self._steps.items()) if step.started_ns >= self._began_ns]

    def add_columns(self, requests: pd.DataFrame) -> pd.DataFrame:
        """`requests` with the engine's figures of the same requests beside the client's: ``engine_*_ms``."""
        known = [self._requests.get(request_id) for request_id in requests["request_id"]]
        figures = [_figures(record) if record is not None else {} for record in known]
        wider = requests.copy()
        for name in ("queue_ms", *AGREEMENT):
            wider[f"engine_{name}"] = [found.get(name) for found in figures]
        return wider


def agreement(requests: pd.DataFrame) -> dict[str, Any] | None:
    """How far the client's figures are from the engine's, request by request, ms; None without the engine's."""
    if "engine_e2e_ms" not in requests:
        return None
    found: dict[str, Any] = {"num_requests": int(requests["engine_e2e_ms"].notna().sum())}
    for name in AGREEMENT:
        apart = (requests[name].astype(float) - requests[f"engine_{name}"].astype(float)).dropna().abs()
        found[name] = distribution(apart.to_numpy(float))
    return found


def step_figures(steps: Sequence[StepSummary], limits: Limits | None) -> dict[str, Any]:
    """What the steps did with their time, and their share of what the machine could have done."""
    if not steps:
        return {"num_steps": 0}
    wall_s = (steps[-1].ended_ns - steps[0].started_ns) / 1e9
    busy_s = sum(step.ended_ns - step.started_ns for step in steps) / 1e9
    decoding = [step.num_decode_tokens for step in steps if step.num_decode_tokens]
    found: dict[str, Any] = {
        "num_steps": len(steps),
        "num_missing": steps[-1].step_id - steps[0].step_id + 1 - len(steps),
        "step_ms": distribution(np.asarray([step.ended_ns - step.started_ns for step in steps]) / NS_PER_MS),
        "busy_share": min(busy_s / wall_s, 1.0) if wall_s else None,
        "decode_batch_mean": float(np.mean(decoding)) if decoding else None,
        "waiting_max": max(step.num_waiting for step in steps),
    }
    for part in ("schedule", "prepare", "forward", "sample"):
        found[f"{part}_share"] = (
            sum(getattr(step, f"{part}_ms") for step in steps) / 1e3 / busy_s if busy_s else None
        )
    return found | {"limit": _share_of_limit(steps, limits, wall_s) if limits else None}


def weight_bytes(steps: Sequence[StepSummary]) -> int:
    """What a usual step reads of weights."""
    return int(np.median([step.weight_bytes for step in steps])) if steps else 0


def _share_of_limit(steps: Sequence[StepSummary], limits: Limits, wall_s: float) -> dict[str, Any] | None:
    """Least time of all steps by the time they took, over the whole run and while there was work; and what the time went to."""
    found = spent(StepArrays.of(steps), limits)
    if not found.floor_s:
        return None  # a runner without a model needs nothing
    return {
        "share_of_limit": found.floor_s / wall_s,
        "share_of_limit_busy": found.share,
        "bound_by": found.bound,
        "bound_by_memory_share": (found.weights_s + found.kv_s) / found.floor_s,
        "seconds": {
            "weights": found.weights_s, "KV": found.kv_s, "compute": found.compute_s, "kernels": found.kernels_s,
            "host": found.host_s, "idle": found.idle_s,
        },
        "bytes_per_s": found.num_bytes / wall_s,
        "flops_per_s": found.num_flops / wall_s,
        "machine_bytes_per_s": limits.bytes_s,
        "machine_flops_per_s": limits.flops_s,
        "dtype": limits.dtype,
        "device": limits.device,
        "working_set_bytes": limits.working_set_bytes,
    }  # fmt: skip


def _figures(record: RequestRecord) -> dict[str, float | None]:
    from workbench.observe.request_row import row_of

    row = row_of(record, "", "")
    return {name: row[name] for name in ("queue_ms", *AGREEMENT)}
