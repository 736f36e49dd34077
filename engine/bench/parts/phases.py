"""What bounds each phase of a run, from its step records.

A step's wall time runs from the end of the step before it to its own end, so that the phases add up to the run. Of that the
device was busy for the forward pass and the sampling, by its own clock; the rest it waited for the host (`host`). On a GPU the
device's clock starts when it reaches the step and counts its waits for single launches within the step as busy: what launches
cost shows as a low share of the floor, not as `host`.

Boundary: arithmetic on records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.bench.parts.floors import ModelCost
from engine.bench.parts.limits import Limits
from engine.records import StepRecord


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of one kind, summed up. Least seconds by what they are spent on, and those that passed."""

    name: str
    steps: int
    seconds: float  # wall time
    device_s: float  # busy
    prepare_s: float  # of the host: inputs of the steps
    schedule_s: float  # of the host: planning and committing
    weights_s: float
    kv_s: float
    compute_s: float
    floor_s: float

    @property
    def host_s(self) -> float:
        """Time in which the device had nothing to do."""
        return max(0.0, self.seconds - self.device_s)

    @property
    def bound(self) -> str:
        """What takes longest at the least: reading weights or KV, multiplying, or waiting for the host."""
        parts = {"weights": self.weights_s, "KV": self.kv_s, "compute": self.compute_s, "host": self.host_s}
        return max(parts, key=lambda name: parts[name])

    def figures(self) -> dict[str, Any]:
        return {
            "phase": self.name, "steps": self.steps, "wall_s": round(self.seconds, 4),
            "device_s": round(self.device_s, 4), "host_s": round(self.host_s, 4),
            "prepare_s": round(self.prepare_s, 4), "schedule_s": round(self.schedule_s, 4),
            "weights_s": round(self.weights_s, 6), "kv_s": round(self.kv_s, 6),
            "compute_s": round(self.compute_s, 6), "floor_s": round(self.floor_s, 6),
            "of_floor": round(self.floor_s / self.seconds, 4) if self.seconds else 0.0, "bound_by": self.bound,
        }  # fmt: skip


def phases(steps: Sequence[StepRecord], cost: ModelCost, limits: Limits) -> list[Phase]:
    """Prefill (any step that computes prompt tokens) and decode; a phase without steps is left out."""
    found: dict[str, list[tuple[StepRecord, float]]] = {"prefill": [], "decode": []}
    previous_ns = steps[0].started_ns if steps else 0
    for step in steps:
        name = "prefill" if step.num_prefill_tokens else "decode"
        found[name].append((step, (step.ended_ns - previous_ns) / 1e9))
        previous_ns = step.ended_ns
    return [_phase(name, pairs, cost, limits) for name, pairs in found.items() if pairs]


def idle_share(steps: Sequence[StepRecord]) -> float:
    """Share of the time from the first step's start to the last one's end in which the device had no step to run."""
    wall_s = (steps[-1].ended_ns - steps[0].started_ns) / 1e9
    return max(0.0, 1.0 - sum(map(device_s, steps)) / wall_s)


def device_s(step: StepRecord) -> float:
    """Seconds that the device was busy with a step."""
    return (step.forward_ms + step.sample_ms) / 1e3


def _phase(name: str, pairs: Sequence[tuple[StepRecord, float]], cost: ModelCost, limits: Limits) -> Phase:
    weights_s = cost.weight_bytes / limits.bytes_s
    kv_s = compute_s = floor_s = 0.0
    for step, _ in pairs:
        step_kv_s = max(0.0, step.bytes_needed - cost.weight_bytes) / limits.bytes_s
        step_compute_s = step.flops_needed / limits.flops_s
        kv_s += step_kv_s
        compute_s += step_compute_s
        if step.num_prefill_tokens:  # attention over a prompt multiplies while it reads
            floor_s += max(weights_s + step_kv_s, step_compute_s)
        else:
            floor_s += cost.decode_s(limits, step.num_decode_tokens, 0) + step_kv_s
    steps = [step for step, _ in pairs]
    return Phase(
        name, len(steps), sum(seconds for _, seconds in pairs), sum(map(device_s, steps)),
        sum(step.prepare_ms for step in steps) / 1e3, sum(step.schedule_ms for step in steps) / 1e3,
        weights_s * len(steps), kv_s, compute_s, floor_s,
    )  # fmt: skip
