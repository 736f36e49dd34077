"""Limits: how fast this machine reads memory and multiplies matrices, measured beside the benchmark.

Both are the best of several repeats: a limit is what can be reached. Memory is read from a buffer as large as what a step
reads, because a small model's weights stay in the processor's cache, which is faster than memory. Matrices are multiplied in
the engine's dtype.

Boundary: two rates of one device. What a step needs of them is in the engine's StepRecords.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MIN_BYTES, _MAX_BYTES = 4 << 20, 1 << 30
_BUDGET_S = 0.6  # of each of the two measurements
_CPU_SIZE = 1024
_GPU_BYTES = 2 << 30
_GPU_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device was measured to do."""

    bytes_s: float  # read
    flops_s: float  # of products in `dtype`
    dtype: str
    device: str
    working_set_bytes: int  # what was read, over and over

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The least time that so many bytes and operations take."""
        return max(num_bytes / self.bytes_s, flops / self.flops_s)


def measure_limits(device: str, dtype: str, working_set_bytes: int) -> Limits:
    """Measure; about a second, more on the first use of a GPU. Imports torch; keeps all cores busy meanwhile.

    Raises:
        RuntimeError: torch's own, such as out of memory beside a resident engine.
    """
    import torch

    on_gpu = device.startswith("cuda")
    place = torch.device(device)
    num_bytes = _GPU_BYTES if on_gpu else min(max(working_set_bytes, _MIN_BYTES), _MAX_BYTES)
    values = torch.rand(num_bytes // 4, dtype=torch.float32, device=place)
    read_s = _best_seconds(values.sum, place)
    size = _GPU_SIZE if on_gpu else _CPU_SIZE
    kind: torch.dtype = getattr(torch, dtype, torch.float32)
    left, right = (torch.randn(size, size, device=place).to(kind) for _ in range(2))
    multiply_s = _best_seconds(lambda: torch.mm(left, right), place)
    return Limits(num_bytes / read_s, 2 * size**3 / multiply_s, dtype, device, num_bytes)


def _best_seconds(work: Callable[[], object], place: torch.device) -> float:
    """The shortest of the calls that fit the budget, at least three."""
    import torch

    def once() -> float:
        began = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - began

    once()
    best, until, calls = once(), time.perf_counter() + _BUDGET_S, 0
    while calls < 3 or time.perf_counter() < until:
        best = min(best, once())
        calls += 1
    return best
