"""Floors, and what time went to, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.limits import Limits, StepArrays, floors, spent, working_set
from engine.records import StepRecord

LIMITS = Limits(bytes_s=1e9, flops_s=1e12)  # a megabyte or a billion operations take a millisecond
MB, G, MS = 10**6, 10**9, 10**6
BASE = StepRecord(
    step_id=0, started_ns=0, ended_ns=0, schedule_ms=0.0, prepare_ms=0.0, forward_ms=0.0, sample_ms=0.0, rows=(),
    num_prefill_tokens=0, num_decode_tokens=1, num_waiting=0, num_running=1, num_free_blocks=0, num_cached_blocks=0,
)  # fmt: skip


def step(
    started_ms: float,
    ended_ms: float,
    device_ms: float,
    needs: tuple[int, int, int, int] = (0, 0, 0, 0),
    **other: int,
) -> StepRecord:
    """`needs`: bytes of weights and of KV, operations with weights and of attention."""
    weights, kv, linear, attention = needs
    return replace(
        BASE, started_ns=int(started_ms * MS), ended_ns=int(ended_ms * MS), forward_ms=device_ms - 0.5, sample_ms=0.5,
        bytes_needed=weights + kv, weight_bytes=weights, flops_needed=linear + attention, attention_flops=attention, **other,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("needs", "expected_ms"),
    [
        ((5 * MB, 2 * MB, 1 * G, 1 * G), (5, 2, 0)),  # decoding few rows: reads
        ((5 * MB, 2 * MB, 9 * G, 1 * G), (0, 2, 9)),  # decoding many: multiplies by weights, reads KV
        ((5 * MB, 2 * MB, 40 * G, 30 * G), (0, 0, 70)),  # a long prompt: multiplies
        ((0, 0, 0, 0), (0, 0, 0)),
    ],
)
def test_each_part_of_a_step_takes_as_long_as_reading_or_multiplying(needs, expected_ms):
    found = floors(LIMITS, *needs)
    assert tuple(
        1e3 * float(part) for part in (found.weights_s, found.kv_s, found.compute_s)
    ) == pytest.approx(expected_ms)
    assert found.total_s == pytest.approx(sum(expected_ms) / 1e3)


def test_time_of_a_window_is_split_into_floors_kernels_host_and_idle():
    steps = [
        step(10, 20, 8, (3 * MB, 1 * MB, G, 0)),  # 10 ms idle before; 4 of its 8 device ms are the floor
        step(
            15, 32, 9, (3 * MB, 2 * MB, G, 0), num_running=0
        ),  # planned while the first ran: 12 ms of its own
        step(52, 60, 7, (3 * MB, 0, 6 * G, 0), num_running=0),  # 20 ms without work before it
    ]
    found = spent(StepArrays.of(steps), LIMITS, since_ns=0, until_ns=100 * MS)
    assert found.num_steps == 3
    assert found.wall_s == pytest.approx(0.100)
    assert found.idle_s == pytest.approx(0.010 + 0.020 + 0.040)
    assert found.busy_s == pytest.approx(0.010 + 0.012 + 0.008)
    assert (found.weights_s, found.kv_s, found.compute_s) == pytest.approx((0.006, 0.003, 0.006))
    assert found.kernels_s == pytest.approx(0.024 - 0.015)
    assert found.host_s == pytest.approx(0.030 - 0.024)
    parts = (found.weights_s, found.kv_s, found.compute_s, found.kernels_s, found.host_s, found.idle_s)
    assert sum(parts) == pytest.approx(found.wall_s)
    assert found.share == pytest.approx(0.015 / 0.030)
    assert found.bytes_s == pytest.approx(12 * MB / 0.030)
    assert found.flops_s == pytest.approx(8 * G / 0.030)


def test_gap_with_requests_waiting_is_the_hosts_and_without_it_is_idle():
    first, second = step(0, 10, 10, (MB, 0, 0, 0)), step(37, 47, 10, (MB, 0, 0, 0))
    waits = spent(StepArrays.of([first, second]), LIMITS)
    assert (waits.host_s, waits.idle_s, waits.bound) == (pytest.approx(0.027), 0.0, "host")
    rests = spent(StepArrays.of([replace(first, num_running=0), second]), LIMITS)
    assert (rests.host_s, rests.idle_s, rests.bound) == (0.0, pytest.approx(0.027), "weights")
    # What runs when the window ends has no record yet: that time counts nowhere.
    open_end = spent(StepArrays.of([first, second]), LIMITS, since_ns=0, until_ns=90 * MS)
    assert open_end.wall_s == pytest.approx(0.047)


def test_some_steps_keep_the_time_that_they_had_among_all():
    steps = [step(0, 10, 9), step(5, 16, 5), step(17, 22, 5), step(22, 25, 3)]
    arrays, only = StepArrays.of(steps), np.array([True, False, True, False])
    parts = [spent(arrays, LIMITS, only=mask) for mask in (only, ~only)]
    assert [part.busy_s for part in parts] == pytest.approx([0.010 + 0.006, 0.006 + 0.003])
    assert sum(part.wall_s for part in parts) == pytest.approx(spent(arrays, LIMITS).wall_s)


def test_without_steps_all_is_idle_and_nothing_is_shared():
    found = spent(StepArrays.of([]), LIMITS, since_ns=0, until_ns=30 * MS)
    assert (found.num_steps, found.share, found.bytes_s) == (0, None, 0.0)
    assert found.idle_s == found.wall_s == pytest.approx(0.030)


def test_more_than_the_limit_is_told_and_not_cut():
    found = spent(StepArrays.of([step(0, 10, 8, (12 * MB, 0, 0, 0))]), LIMITS)
    assert found.share == pytest.approx(1.2)
    assert found.kernels_s == 0.0


def test_what_is_read_is_as_large_as_the_weights_on_a_cpu():
    assert [working_set("cpu", n) for n in (0, 5 * 2**20, 8 * 2**20, 2**40)] == [2**22, 2**23, 2**23, 2**28]
    assert working_set("cuda", 5) == 4 * 2**30
