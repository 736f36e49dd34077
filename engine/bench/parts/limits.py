"""Limits: how fast this device reads memory and multiplies matrices, measured in the run that is judged by them.

A GPU: a sum over 4 GiB, and products of 8192³ random bfloat16 values. A CPU, where benchmarks run at reduced size only: less of
both, in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch

REPEATS = 5
GPU_BYTES, GPU_SIZE = 4 << 30, 8192
CPU_BYTES, CPU_SIZE = 16 << 20, 256


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device was measured to do in this run."""

    bytes_s: float  # read
    flops_s: float  # products in bfloat16 on a GPU, float32 on a CPU

    def __str__(self) -> str:
        return f"reads {self.bytes_s / 1e12:.2f} TB/s, multiplies {self.flops_s / 1e12:.3g} TFLOP/s"

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The least time that so many bytes and operations take."""
        return max(num_bytes / self.bytes_s, flops / self.flops_s)

    def figures(self) -> dict[str, float]:
        return asdict(self)


def measure_limits(device: torch.device) -> Limits:
    """Read bandwidth and matrix rate of the device, medians."""
    on_gpu = device.type == "cuda"
    num_bytes, size = (GPU_BYTES, GPU_SIZE) if on_gpu else (CPU_BYTES, CPU_SIZE)
    values = torch.rand(num_bytes // 4, dtype=torch.float32, device=device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timed = seconds_of if on_gpu else _host_seconds_of
    read = timed(values.sum, calls=4)
    multiply = timed(lambda: torch.mm(left, right), calls=8)
    return Limits(num_bytes / read, 2 * size**3 / multiply)


def seconds_of(work: Callable[[], object], *, calls: int = 1, repeats: int = REPEATS) -> float:
    """Median device seconds of one call, by events around `calls` of them."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e-3 / calls)
    return median(times)


def _host_seconds_of(work: Callable[[], object], *, calls: int = 1, repeats: int = REPEATS) -> float:
    """The same by the host's clock, for work that is done when the call returns."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - began) / calls)
    return median(times)
