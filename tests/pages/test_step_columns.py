"""Steps as columns: each record is read once, bins add up, windows and neighbours are right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.records import StepRecord
from workbench.ui.step_columns import MAX_BINS, StepColumns

MS = 1_000_000


def record(step_id: int, ended_ms: float, **values: object) -> StepRecord:
    base: dict[str, object] = {
        "schedule_ms": 0.1, "prepare_ms": 0.2, "forward_ms": 1.0, "sample_ms": 0.3, "rows": (("a", 1),),
        "num_prefill_tokens": 0, "num_decode_tokens": 1, "num_waiting": 0, "num_running": 1, "num_free_blocks": 9,
        "num_cached_blocks": 2,
    }  # fmt: skip
    ended = int(ended_ms * MS)
    return StepRecord(step_id=step_id, started_ns=ended - MS // 2, ended_ns=ended, **{**base, **values})  # type: ignore[arg-type]


class Source:
    """A record log that counts what it gave out."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.given = 0

    def steps(self, since_ns: int | None = None, until_ns: int | None = None) -> list[StepRecord]:
        found = [r for r in self.records if since_ns is None or r.ended_ns >= since_ns]
        self.given += len(found)
        return found


def columns_of(records: list[StepRecord], record_seconds: int = 600) -> StepColumns:
    source = Source()
    source.records = records
    columns = StepColumns(source, record_seconds)
    columns.refresh()
    return columns


def test_each_record_is_taken_once():
    source = Source()
    columns = StepColumns(source, 600)
    for batch in range(10):
        source.records += [record(batch * 10 + i, batch * 10 + i) for i in range(10)]
        assert columns.refresh() == len(source.records)
        assert columns.refresh() == len(source.records)
    assert source.given <= len(source.records) + 20  # each refresh sees its newest record again, no more


@given(
    gaps=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    num_bins=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_bins_match_a_plain_loop(gaps, num_bins, seed):
    rng = np.random.default_rng(seed)
    times = np.cumsum(gaps).tolist()
    records = [
        record(i, t, num_decode_tokens=int(rng.integers(0, 9)), num_prefill_tokens=int(rng.integers(0, 50)),
               forward_ms=float(rng.integers(1, 90)), num_running=int(rng.integers(0, 9)))
        for i, t in enumerate(times)
    ]  # fmt: skip
    since, until = int(times[0] * MS), int((times[-1] + 1) * MS)
    bins = columns_of(records).bins(since, until, num_bins)
    by_bin: list[list[StepRecord]] = [[] for _ in range(num_bins)]
    for r in records:
        by_bin[(r.ended_ns - since) * num_bins // (until - since)].append(r)
    seconds = (until - since) / num_bins / 1e9
    running = None
    for place, found in enumerate(by_bin):
        assert bins.num_steps[place] == len(found)
        assert bins.last_step_id[place] == (found[-1].step_id if found else -1)
        decode = sum(r.num_decode_tokens for r in found) / seconds
        assert bins.values["decode"][place] == pytest.approx(decode, rel=1e-6)
        if found:
            assert bins.values["forward"][place] == pytest.approx(
                sum(r.forward_ms for r in found) / len(found), rel=1e-5
            )
            assert bins.values["running"][place] == max(r.num_running for r in found)
            running = found[-1].num_running
        else:
            assert np.isnan(bins.values["forward"][place])
            assert bins.values["running"][place] == running


def test_gauge_holds_its_last_value_from_before_the_window():
    columns = columns_of([record(0, 10, num_running=3), record(1, 100, num_running=5)])
    bins = columns.bins(50 * MS, 60 * MS, 2)
    assert bins.num_steps.sum() == 0
    assert bins.values["running"].tolist() == [3, 3]


def test_empty_log_gives_empty_bins():
    columns = columns_of([])
    bins = columns.bins(0, 1000 * MS, 10)
    assert bins.num_steps.sum() == 0
    assert np.isnan(bins.values["running"]).all()
    assert columns.span_ns() is None
    assert columns.step_at(5) is None
    assert columns.neighbour(5, 0) is None


def test_step_at_and_neighbours():
    columns = columns_of([record(i, 10 * (i + 1)) for i in range(5)])
    assert columns.step_at(9 * MS) is None
    assert columns.step_at(10 * MS) == 0
    assert columns.step_at(39 * MS) == 2
    assert columns.neighbour(39 * MS, 1) == 40 * MS
    assert columns.neighbour(39 * MS, -1) == 20 * MS
    assert columns.neighbour(50 * MS, 1) is None
    assert columns.around(30 * MS, 2, 1)["step_id"].tolist() == [1, 2, 3]
    assert columns.window(20 * MS, 40 * MS)["step_id"].tolist() == [1, 2]


def test_what_is_older_than_the_horizon_goes():
    source = Source()
    columns = StepColumns(source, 1)
    for batch in range(8):
        source.records = [record(batch * 1000 + i, batch * 1000 + i) for i in range(1000)]
        size = columns.refresh()
    assert size <= 4096  # not 8,000
    oldest, newest = columns.span_ns()
    assert newest - oldest <= 1001 * MS


def test_browser_never_gets_more_than_the_limit():
    columns = columns_of([record(i, i) for i in range(2000)])
    assert len(columns.bins(0, 2000 * MS, 100_000).num_steps) == MAX_BINS
