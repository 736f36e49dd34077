"""What a device can do at most, the least time that steps could take on it, and what the rest of the time went to.

A step multiplies by its weights while it reads them, then, layer by layer, queries with keys and values while it reads those:

    floor = max(weight bytes ÷ bandwidth, linear operations ÷ matrix rate)
          + max(KV bytes ÷ bandwidth, attention operations ÷ matrix rate)

While decoding that is the time to read weights and KV, of a prefill the time to multiply. Each of the two maxima counts as what
it is due to: weights or KV where reading takes longer, else compute.

A step's wall time runs from the end of the step before it to its own end; without the time in which nothing was asked of the
engine (idle) it is busy time. Of that the device worked for the forward pass and the sampling, by its own clock; the rest it
waited for the host. Device time above the floor is the kernels'. On a GPU the device's clock counts its waits for single
launches within a step as work.

Boundary: arithmetic on step records; no torch. Limits are measured by ``engine.device_limits``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
GPU_READ_BYTES = 4 << 30  # far more than any cache
MIN_READ_BYTES, MAX_READ_BYTES = 4 << 20, 256 << 20  # on a CPU


@dataclass(frozen=True, slots=True)
class Limits:
    """What one device was measured to do, and in what form."""

    bytes_s: float  # read
    flops_s: float  # of matrix products in `dtype`
    dtype: str = ""
    device: str = ""
    working_set_bytes: int = 0  # what was read, over and over: what fits a cache is read faster than memory

    def __str__(self) -> str:
        return f"reads {self.bytes_s / 1e12:.3g} TB/s, multiplies {self.flops_s / 1e12:.3g} TFLOP/s"

    def figures(self) -> dict[str, Any]:
        return asdict(self)


def working_set(device_type: str, weights_bytes: int) -> int:
    """The bytes to read when bandwidth is measured for steps that read so many of weights: on a CPU, where small weights stay in
    the cache, the power of two above, within bounds."""
    if device_type == "cuda":
        return GPU_READ_BYTES
    return min(max(1 << max(0, weights_bytes - 1).bit_length(), MIN_READ_BYTES), MAX_READ_BYTES)


@dataclass(frozen=True, slots=True)
class Floors:
    """Least seconds of each step by what they are spent on."""

    weights_s: Floats
    kv_s: Floats
    compute_s: Floats

    @property
    def total_s(self) -> float:
        return float(np.sum(self.weights_s + self.kv_s + self.compute_s))


def floors(
    limits: Limits,
    weight_bytes: Floats | float,
    kv_bytes: Floats | float,
    linear_flops: Floats | float,
    attention_flops: Floats | float,
) -> Floors:
    """The floors of steps with these needs, numbers or arrays [N]."""
    weights, linear = np.divide(weight_bytes, limits.bytes_s), np.divide(linear_flops, limits.flops_s)
    kv, attention = np.divide(kv_bytes, limits.bytes_s), np.divide(attention_flops, limits.flops_s)
    return Floors(
        weights_s=np.where(weights >= linear, weights, 0.0),
        kv_s=np.where(kv >= attention, kv, 0.0),
        compute_s=np.where(weights >= linear, 0.0, linear) + np.where(kv >= attention, 0.0, attention),
    )


@dataclass(frozen=True, slots=True)
class StepArrays:
    """Steps in the order of their ends, as columns [N]."""

    started_ns: NDArray[np.int64]
    ended_ns: NDArray[np.int64]
    device_s: Floats
    weight_bytes: Floats
    kv_bytes: Floats
    linear_flops: Floats
    attention_flops: Floats
    leaves_work: NDArray[np.bool_]  # requests ran or waited when it had ended

    @classmethod
    def of(cls, steps: Sequence[Any]) -> StepArrays:
        """Of StepRecords, or of anything with the same fields."""

        def column(read: Callable[[Any], float]) -> Floats:
            return np.array([read(step) for step in steps], np.float64)

        return cls(
            started_ns=np.array([step.started_ns for step in steps], np.int64),
            ended_ns=np.array([step.ended_ns for step in steps], np.int64),
            device_s=column(lambda step: (step.forward_ms + step.sample_ms) / 1e3),
            weight_bytes=column(lambda step: step.weight_bytes),
            kv_bytes=column(lambda step: step.bytes_needed - step.weight_bytes),
            linear_flops=column(lambda step: step.flops_needed - step.attention_flops),
            attention_flops=column(lambda step: step.attention_flops),
            leaves_work=np.array([step.num_running + step.num_waiting > 0 for step in steps], np.bool_),
        )

    def idle_s(self, since_ns: int | None = None, until_ns: int | None = None) -> tuple[Floats, float]:
        """Seconds before each step in which there was nothing to do, and those after the last one.

        Before the first step all of the window counts; after a last one that left work behind nothing does: the step that
        runs then has no record yet.
        """
        gaps = np.zeros(len(self.started_ns))
        if not len(gaps):
            return gaps, 0.0 if since_ns is None or until_ns is None else (until_ns - since_ns) / 1e9
        free = ~self.leaves_work[:-1]
        gaps[1:][free] = np.maximum(0, self.started_ns[1:] - self.ended_ns[:-1])[free] / 1e9
        if since_ns is not None:
            gaps[0] = max(0, int(self.started_ns[0]) - since_ns) / 1e9
        after_ns = 0 if until_ns is None or self.leaves_work[-1] else until_ns - int(self.ended_ns[-1])
        return gaps, max(0, after_ns) / 1e9

    def busy_s(self) -> Floats:
        """Wall seconds of each step without what was idle before it."""
        begins, before = self.started_ns.copy(), self.ended_ns[:-1]
        begins[1:] = np.where(self.leaves_work[:-1], before, np.maximum(begins[1:], before))
        return np.asarray(np.maximum(0, self.ended_ns - begins) / 1e9, np.float64)


@dataclass(frozen=True, slots=True)
class Spent:
    """Where the seconds of some steps went. The parts add up to the wall time unless the floor was above the device's time."""

    num_steps: int
    idle_s: float
    busy_s: float
    device_s: float  # of the busy seconds
    weights_s: float  # of the floor, as the next two
    kv_s: float
    compute_s: float
    num_bytes: float  # needed
    num_flops: float

    @property
    def wall_s(self) -> float:
        return self.idle_s + self.busy_s

    @property
    def floor_s(self) -> float:
        return self.weights_s + self.kv_s + self.compute_s

    @property
    def kernels_s(self) -> float:
        """What the device took above the floor."""
        return max(0.0, self.device_s - self.floor_s)

    @property
    def host_s(self) -> float:
        """What the device waited for the host."""
        return self.busy_s - self.device_s

    @property
    def share(self) -> float | None:
        """The floor's share of the busy time; above 1 only where more was reached than had been measured as the limit."""
        return self.floor_s / self.busy_s if self.busy_s and self.floor_s else None

    @property
    def bound(self) -> str:
        """What to look at first: "host" where the device waited longer than it worked, else the largest part of the floor:
        "weights", "KV" or "compute"."""
        parts = {"weights": self.weights_s, "KV": self.kv_s, "compute": self.compute_s}
        return "host" if self.host_s > self.device_s else max(parts, key=lambda name: parts[name])

    @property
    def bytes_s(self) -> float:
        """Bytes needed in a busy second."""
        return self.num_bytes / self.busy_s if self.busy_s else 0.0

    @property
    def flops_s(self) -> float:
        """Operations needed in a busy second."""
        return self.num_flops / self.busy_s if self.busy_s else 0.0


def spent(
    steps: StepArrays,
    limits: Limits,
    *,
    since_ns: int | None = None,
    until_ns: int | None = None,
    only: NDArray[np.bool_] | None = None,
) -> Spent:
    """What the time of some steps went to.

    `since_ns`, `until_ns`: the window that they are the steps of; None: it begins with the first and ends with the last one.
    `only`: which of them count [N]; times are measured among all, so that parts add up to the whole.
    """
    needs = steps.weight_bytes, steps.kv_bytes, steps.linear_flops, steps.attention_flops
    least = floors(limits, *needs)
    gaps, after_s = steps.idle_s(since_ns, until_ns)
    chosen = np.ones(len(gaps), np.bool_) if only is None else only

    def total(values: Floats) -> float:
        return float(values[chosen].sum())

    busy_s = total(steps.busy_s())
    return Spent(
        num_steps=int(chosen.sum()),
        idle_s=total(gaps) + (after_s if only is None else 0.0),
        busy_s=busy_s,
        device_s=min(busy_s, total(steps.device_s)),
        weights_s=total(least.weights_s),
        kv_s=total(least.kv_s),
        compute_s=total(least.compute_s),
        num_bytes=total(steps.weight_bytes) + total(steps.kv_bytes),
        num_flops=total(steps.linear_flops) + total(steps.attention_flops),
    )
