"""Measuring limits: how fast a device reads memory and multiplies matrices.

A GPU: a sum over 4 GiB, and products of 8192³ random values in the engine's dtype, the median of repeats, because a chip slows
down as it gets warm. A CPU: the best of repeats, because other processes take its cores away, and of two ways each: torch's, and the
engine's own packed product where it can be compiled, which reads what lies in the cache faster. There the memory read is as large
as the weights that a step reads.

Boundary: two rates of one device. What a step needs of them is in its record, what follows in ``engine.limits``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from engine.kernels import cpu_library
from engine.kernels.packed_linear import pack_weight, packed_linear
from engine.limits import Limits, working_set

GPU_SIZE = 8192
GPU_REPEATS = 5
CPU_SIZE, CPU_ROWS = 1024, (64, 256)
BUDGET_S = 0.8  # of all repeats on a CPU

Work = Callable[[], object]


class Interrupted(Exception):
    """The measurement was told to end: what it had is of no use."""


def measure_limits(
    device: torch.device,
    dtype: torch.dtype,
    weights_bytes: int = 0,
    *,
    budget_s: float = BUDGET_S,
    should_stop: Callable[[], bool] = lambda: False,
) -> Limits:
    """Measure a device in a dtype; a CPU takes about `budget_s`. Its cores are torch's threads, all busy meanwhile.

    Raises:
        Interrupted: `should_stop` said so, asked every few milliseconds.
        RuntimeError: torch's own, such as out of memory beside a resident engine.
    """
    with torch.inference_mode():
        if device.type == "cuda":
            return _measure_gpu(device, dtype, should_stop)
        return _measure_cpu(dtype, working_set(device.type, weights_bytes), budget_s, should_stop)


def _measure_gpu(device: torch.device, dtype: torch.dtype, should_stop: Callable[[], bool]) -> Limits:
    try:
        with torch.cuda.device(device):
            num_bytes, bytes_s = _gpu_read(device, should_stop)
            flops_s = _gpu_multiply(device, dtype, should_stop)
    finally:
        torch.cuda.empty_cache()  # an engine beside this one may need it
    return Limits(bytes_s, flops_s, _name(dtype), str(device), num_bytes)


def _gpu_read(device: torch.device, should_stop: Callable[[], bool]) -> tuple[int, float]:
    free, _ = torch.cuda.mem_get_info(device)
    # Not all that is free: an engine beside this one needs some for its steps.
    num_bytes = min(working_set(device.type, 0), free // 4) // 4 * 4
    values = torch.rand(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes, num_bytes / seconds_of(values.sum, calls=4, should_stop=should_stop)


def _gpu_multiply(device: torch.device, dtype: torch.dtype, should_stop: Callable[[], bool]) -> float:
    left, right = (torch.randn(GPU_SIZE, GPU_SIZE, device=device).to(dtype) for _ in range(2))
    seconds = seconds_of(lambda: torch.mm(left, right), calls=8, should_stop=should_stop)
    return 2 * GPU_SIZE**3 / seconds


def seconds_of(
    work: Work, *, calls: int = 1, repeats: int = GPU_REPEATS, should_stop: Callable[[], bool] = lambda: False
) -> float:
    """Median device seconds of one call on a GPU, by events around `calls` of them. Raises Interrupted."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if should_stop():
            raise Interrupted
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e-3 / calls)
    return median(times)


def _measure_cpu(
    dtype: torch.dtype, num_bytes: int, budget_s: float, should_stop: Callable[[], bool]
) -> Limits:
    reads, products = list(_cpu_reads(dtype, num_bytes)), list(_cpu_products(dtype))
    share_s = budget_s / (len(reads) + len(products))
    bytes_s = max(size / _best_seconds(work, share_s, should_stop) for size, work in reads)
    flops_s = max(size / _best_seconds(work, share_s, should_stop) for size, work in products)
    return Limits(bytes_s, flops_s, _name(dtype), "cpu", num_bytes)


def _cpu_reads(dtype: torch.dtype, num_bytes: int) -> Iterator[tuple[int, Work]]:
    """Ways to read: (bytes, call)."""
    values = torch.zeros(num_bytes // 4).fill_(1.0)
    yield num_bytes, values.sum
    library = cpu_library.load() if dtype in (torch.float32, torch.bfloat16) else None
    if library is not None:
        x = torch.ones(1, CPU_SIZE, dtype=dtype)
        packed = pack_weight(library, torch.ones(num_bytes // 2 // CPU_SIZE, CPU_SIZE, dtype=torch.bfloat16))
        yield packed.num_bytes, lambda: packed_linear(library, x, packed)


def _cpu_products(dtype: torch.dtype) -> Iterator[tuple[int, Work]]:
    """Ways to multiply: (operations, call)."""
    right = torch.randn(CPU_SIZE, CPU_SIZE).to(dtype)
    for rows in CPU_ROWS:
        left = torch.randn(rows, CPU_SIZE).to(dtype)
        yield 2 * rows * CPU_SIZE**2, lambda left=left: torch.mm(left, right)  # type: ignore[misc]
    library = cpu_library.load() if dtype in (torch.float32, torch.bfloat16) else None
    if library is not None:
        packed = pack_weight(library, right)
        for rows in CPU_ROWS:
            left = torch.randn(rows, CPU_SIZE).to(dtype)
            yield 2 * rows * CPU_SIZE**2, lambda left=left: packed_linear(library, left, packed)  # type: ignore[misc]


def _best_seconds(work: Work, budget_s: float, should_stop: Callable[[], bool]) -> float:
    """The shortest of the calls that fit the budget, at least two after one that warms up."""
    best, calls, until = float("inf"), 0, time.perf_counter() + budget_s
    while calls < 3 or time.perf_counter() < until:
        if should_stop():
            raise Interrupted
        began = time.perf_counter()
        work()
        if calls:
            best = min(best, time.perf_counter() - began)
        calls += 1
    return best


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
