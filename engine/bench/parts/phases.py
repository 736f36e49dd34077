"""What bounds each phase of a run, from its step records: `engine.limits.spent` of its prefill and of its decode steps.

A step's wall time runs from the end of the step before it to its own end, so that the phases add up to the run.

Boundary: arithmetic on records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.limits import Limits, Spent, StepArrays, spent
from engine.records import StepRecord


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of one kind, summed up."""

    name: str
    spent: Spent
    prepare_s: float  # of the host: inputs of the steps
    schedule_s: float  # of the host: planning and committing

    def figures(self) -> dict[str, Any]:
        found = self.spent
        return {
            "phase": self.name, "steps": found.num_steps, "wall_s": round(found.wall_s, 4),
            "device_s": round(found.device_s, 4), "host_s": round(found.host_s, 4),
            "prepare_s": round(self.prepare_s, 4), "schedule_s": round(self.schedule_s, 4),
            "weights_s": round(found.weights_s, 6), "kv_s": round(found.kv_s, 6),
            "compute_s": round(found.compute_s, 6), "floor_s": round(found.floor_s, 6),
            "of_floor": round(found.share or 0.0, 4), "bound_by": found.bound,
        }  # fmt: skip


def phases(steps: Sequence[StepRecord], limits: Limits) -> list[Phase]:
    """Prefill (any step that computes prompt tokens) and decode; a phase without steps is left out."""
    arrays = StepArrays.of(steps)
    prefills = np.array([step.num_prefill_tokens > 0 for step in steps], np.bool_)
    found = []
    for name, only in (("prefill", prefills), ("decode", ~prefills)):
        if only.any():
            own = [step for step, is_own in zip(steps, only, strict=True) if is_own]
            prepare_ms, schedule_ms = sum(s.prepare_ms for s in own), sum(s.schedule_ms for s in own)
            found.append(Phase(name, spent(arrays, limits, only=only), prepare_ms / 1e3, schedule_ms / 1e3))
    return found


def idle_share(steps: Sequence[StepRecord]) -> float:
    """Share of the time from the first step's start to the last one's end in which the device had no step to run."""
    wall_s = (steps[-1].ended_ns - steps[0].started_ns) / 1e9
    return max(0.0, 1.0 - float(StepArrays.of(steps).device_s.sum()) / wall_s)
