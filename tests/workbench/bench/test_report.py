"""Figures: what the table says, by hand-computable records."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from engine.limits import Limits
from workbench.backends.codec import StepSummary
from workbench.bench import compare
from workbench.bench.driver import CANCELLED, ClientRecord
from workbench.bench.engine_side import step_figures
from workbench.bench.report import figures, is_good, live_figures, request_table

MS = 1_000_000


def record(index: int, **changes: object) -> ClientRecord:
    """Sent at index·100 ms, first token 20 ms later, then one every 10 ms, five tokens; ends 2 ms after the last."""
    sent = index * 100 * MS
    events = tuple(sent + (20 + 10 * n) * MS for n in range(5))
    facts = {
        "index": index, "request_id": f"r{index}", "planned_ns": None, "ready_ns": sent - MS, "sent_ns": sent,
        "event_ns": events, "last_ns": events[-1], "end_ns": events[-1] + 2 * MS, "status": 200, "finish_reason": "length",
        "error": None, "asked_input_tokens": 8, "asked_output_tokens": 5, "num_input_tokens": 8, "num_cached_tokens": 0,
        "num_output_tokens": 5,
    }  # fmt: skip
    return ClientRecord(**{**facts, **changes})  # type: ignore[arg-type]


def test_figures_of_equal_requests():
    found = figures(request_table([record(n) for n in range(3)], 0))
    assert found["ttft_ms"] == {"mean": 20.0, "p50": 20.0, "p95": 20.0, "p99": 20.0}
    assert found["tpot_ms"]["p99"] == 10.0
    assert found["itl_ms"]["mean"] == 10.0
    assert found["e2e_ms"]["p50"] == 60.0
    assert (found["num_requests"], found["num_ok"], found["num_failed"], found["errors"]) == (3, 3, 0, {})
    assert found["duration_s"] == pytest.approx(0.262)
    assert found["output_tokens_per_s"] == pytest.approx(15 / 0.262)
    assert found["requests_per_s"] == pytest.approx(3 / 0.262)
    assert found["generator"]["lateness_ms"]["max"] == 1.0
    assert found["generator"]["kept_time"]


def test_percentiles_come_from_raw_values():
    records = [record(n, event_ns=(n * 100 * MS + (n + 1) * MS,), num_output_tokens=1) for n in range(101)]
    found = figures(request_table(records, 0))
    ttft = np.arange(1, 102)
    assert found["ttft_ms"]["p95"] == np.percentile(ttft, 95)
    assert found["ttft_ms"]["p99"] == np.percentile(ttft, 99)
    assert found["tpot_ms"]["mean"] is None  # one token has no time per further token
    assert found["itl_ms"]["p50"] is None


def test_failures_are_counted_by_reason_and_left_out_of_latencies():
    failed = {"event_ns": (), "last_ns": None, "num_output_tokens": None}
    records = [
        record(0), record(1, error="HTTP 503: busy", **failed), record(2, error="HTTP 503: busy", **failed),
        record(3, error="timeout", **failed), record(4, error=CANCELLED, **failed),
    ]  # fmt: skip
    found = figures(request_table(records, 0), slo={"ttft_ms": 30.0})
    assert (found["num_requests"], found["num_ok"], found["num_failed"], found["num_cancelled"]) == (
        4,
        1,
        3,
        1,
    )
    assert found["errors"] == {"HTTP 503: busy": 2, "timeout": 1}
    assert found["ttft_ms"]["mean"] == 20.0
    assert found["goodput"]["share"] == 0.25  # failed requests did not keep the objective


def test_nothing_went_well():
    found = figures(
        request_table([record(0, error="timeout", event_ns=(), last_ns=None, num_output_tokens=None)], 0)
    )
    assert found["ttft_ms"]["p50"] is None
    assert found["output_tokens_per_s"] == 0
    assert figures(request_table([], 0))["num_requests"] == 0


def test_goodput_needs_every_limit():
    table = request_table([record(n) for n in range(4)], 0)
    table.loc[1, "ttft_ms"] = 50.0
    table.loc[2, "tpot_ms"] = 20.0
    table.loc[3, "tpot_ms"] = np.nan  # one token only
    assert is_good(table, {"ttft_ms": 30.0, "tpot_ms": 15.0}).tolist() == [True, False, False, True]
    assert is_good(table, {}).all()


@pytest.mark.parametrize(("late_ms", "lag_ms", "kept"), [(1, 0.5, True), (40, 0.5, False), (1, 40, False)])
def test_a_generator_that_is_late_says_so(late_ms, lag_ms, kept):
    records = [record(n, ready_ns=n * 100 * MS - late_ms * MS) for n in range(50)]
    generator = figures(request_table(records, 0), loop_lag_ms=[lag_ms] * 100)["generator"]
    assert generator["kept_time"] is kept
    assert ("generator" in generator["message"]) is not kept


def test_live_figures_are_the_figures_of_the_same_requests():
    records = [record(n) for n in range(20)]
    whole, live = figures(request_table(records, 0)), live_figures(records)
    for name in ("ttft_ms", "tpot_ms", "e2e_ms", "output_tokens_per_s", "num_requests", "num_failed"):
        assert live[name] == pytest.approx(whole[name])


def test_a_saved_table_gives_the_same_figures(tmp_path):
    records = [record(n) for n in range(5)] + [
        record(5, error="timeout", event_ns=(), last_ns=None, num_output_tokens=None)
    ]
    table = request_table(records, 0)
    table.to_parquet(tmp_path / "t.parquet")
    assert figures(pd.read_parquet(tmp_path / "t.parquet")) == figures(table)


def test_share_of_limit_is_least_time_by_time_taken():
    def step(number: int, num_bytes: int, flops: int) -> StepSummary:
        began = number * 10 * MS
        return StepSummary(number, began, began + 8 * MS, 1, 1, 4, 2, 0, 3, 0, 3, 9, 0, num_bytes, flops)

    limits = Limits(bytes_s=1e9, flops_s=1e12, dtype="float32", device="cpu", working_set_bytes=1)
    found = step_figures(
        [step(0, 4_000_000, 0), step(1, 0, 2_000_000_000)], limits
    )  # 4 ms of reading, 2 ms of computing
    assert found["limit"]["share_of_limit"] == pytest.approx(6 / 18)
    assert found["limit"]["share_of_limit_busy"] == pytest.approx(
        6 / 18
    )  # requests ran between the steps too
    assert found["limit"]["bound_by"] == "KV"  # 4 ms of the floor, compute 2; the device worked for 12 of 18
    assert found["limit"]["seconds"] == pytest.approx(
        {"weights": 0, "KV": 0.004, "compute": 0.002, "kernels": 0.006, "host": 0.006, "idle": 0}
    )
    assert found["limit"]["bound_by_memory_share"] == pytest.approx(4 / 6)
    assert found["busy_share"] == pytest.approx(16 / 18)
    assert found["num_missing"] == 0
    assert found["forward_share"] == pytest.approx(0.5)
    assert step_figures([step(0, 0, 0), step(3, 0, 0)], limits)["num_missing"] == 2
    assert step_figures([step(0, 0, 0)], limits)["limit"] is None
    assert step_figures([], None) == {"num_steps": 0}


def test_ratio_intervals_cover_the_true_ratio(monkeypatch):
    """800 pairs of runs of 60 skewed latencies each, the true ratio of means 1.2: a 95 % interval holds it about as often."""
    monkeypatch.setattr(compare, "DRAWS", 400)
    generator = np.random.default_rng(0)
    held, widths = 0, []
    for _ in range(800):
        a, b = generator.lognormal(3.0, 0.3, 60), 1.2 * generator.lognormal(3.0, 0.3, 60)
        found = compare._ratio(a, b, np.mean, False, generator, lower_is_better=True)
        held += found["low"] <= 1.2 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0.92 <= held / 800 <= 0.97
    assert 0.1 < np.mean(widths) < 0.4
