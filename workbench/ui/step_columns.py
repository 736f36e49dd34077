"""StepColumns: the recorded steps as numpy columns, read once each, whoever watches.

A page that looks at ten minutes of steps must not walk 200,000 Python objects on every refresh: each new record is
turned into one row here, once for the whole process, and windows are cut and binned in numpy. Reads records only.

Bounded like the record log: by time and by rows. Does not keep block ownership: ``RecordLog.block_map`` replays that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.limits import StepArrays
from engine.records import StepRecord

MAX_ROWS = 400_000  # 40 MB at most
MAX_BINS = 400
_INTS = ("step_id", "started_ns", "ended_ns")
_SUMS: dict[str, Callable[[StepRecord], float]] = {
    "prefill": attrgetter("num_prefill_tokens"),
    "decode": attrgetter("num_decode_tokens"),
    "preempted": lambda r: len(r.preempted),
    "cached_tokens": lambda r: sum(n for _, n in r.prefix_hits) if r.prefix_hits else 0,
}
_MEANS: dict[str, Callable[[StepRecord], float]] = {
    "schedule": attrgetter("schedule_ms"),
    "prepare": attrgetter("prepare_ms"),
    "forward": attrgetter("forward_ms"),
    "sample": attrgetter("sample_ms"),
    "rows": lambda r: len(r.rows),
}
_GAUGES: dict[str, Callable[[StepRecord], float]] = {
    "running": attrgetter("num_running"),
    "waiting": attrgetter("num_waiting"),
    "free": attrgetter("num_free_blocks"),
    "cached": attrgetter("num_cached_blocks"),
}
_NEEDS: dict[str, Callable[[StepRecord], float]] = {  # not in bins
    "weight_bytes": attrgetter("weight_bytes"),
    "kv_bytes": lambda r: r.bytes_needed - r.weight_bytes,
    "linear_flops": lambda r: r.flops_needed - r.attention_flops,
    "attention_flops": attrgetter("attention_flops"),
}
_BINNED = {**_SUMS, **_MEANS, **_GAUGES}
_FLOATS = {**_BINNED, **_NEEDS}


class StepSource(Protocol):
    def steps(self, since_ns: int | None = None, until_ns: int | None = None) -> list[StepRecord]: ...


@dataclass(frozen=True, slots=True)
class Bins:
    """A window of steps in bins of equal length. B bins; every array is [B].

    Sums are per second; times are means over the bin's steps, NaN where there was none; gauges are the highest of a bin, and
    what the last step before it left where there was none (NaN before the first).
    """

    since_ns: int
    until_ns: int
    num_steps: NDArray[np.int64]
    last_step_id: NDArray[np.int64]  # -1 where there was none
    values: dict[str, NDArray[np.float64]]

    @property
    def bin_ns(self) -> int:
        return (self.until_ns - self.since_ns) // len(self.num_steps)


class StepColumns:
    """The columns of one record log. Thread-safe: sessions read from their own threads."""

    def __init__(self, source: StepSource, record_seconds: int) -> None:
        self._source = source
        self._horizon_ns = record_seconds * 1_000_000_000
        self._lock = threading.Lock()
        self._size = 0
        self._ints = {name: np.empty(1024, np.int64) for name in _INTS}
        self._floats = {name: np.empty(1024, np.float32) for name in _FLOATS}

    def refresh(self) -> int:
        """Take in the steps recorded since the last call; how many rows there are now."""
        with self._lock:
            last_id, last_ns = -1, None
            if self._size:
                last_id = int(self._ints["step_id"][self._size - 1])
                last_ns = int(self._ints["ended_ns"][self._size - 1])
            fresh = self._source.steps(since_ns=last_ns)
            if last_id >= 0:
                fresh = [r for r in fresh if r.step_id > last_id]
            self._append(fresh[-MAX_ROWS:])
            return self._size

    def _append(self, records: list[StepRecord]) -> None:
        if not records:
            return
        self._make_room(len(records), records[-1].ended_ns - self._horizon_ns)
        low, high = self._size, self._size + len(records)
        for name, column in self._ints.items():
            column[low:high] = [getattr(r, name) for r in records]
        for name, read in _FLOATS.items():
            self._floats[name][low:high] = [read(r) for r in records]
        self._size = high

    def _make_room(self, num_new: int, oldest_ns: int) -> None:
        capacity = len(self._ints["step_id"])
        if self._size + num_new <= capacity:
            return
        ended = self._ints["ended_ns"][: self._size]
        drop = max(int(np.searchsorted(ended, oldest_ns)), self._size + num_new - MAX_ROWS)
        kept = self._size - drop
        capacity = max(1024, 2 * (kept + num_new))
        for columns in (self._ints, self._floats):
            for name, column in columns.items():
                grown = np.empty(capacity, column.dtype)
                grown[:kept] = column[drop : self._size]
                columns[name] = grown
        self._size = kept

    def span_ns(self) -> tuple[int, int] | None:
        """Start of the oldest and end of the newest step still within the horizon; None when there is none."""
        with self._lock:
            if not self._size:
                return None
            ended = self._ints["ended_ns"][: self._size]
            low = int(np.searchsorted(ended, ended[-1] - self._horizon_ns))
            return int(self._ints["started_ns"][low]), int(ended[-1])

    def step_at(self, at_ns: int) -> int | None:
        """The id of the last step that had ended at that time."""
        with self._lock:
            place = int(np.searchsorted(self._ints["ended_ns"][: self._size], at_ns, side="right")) - 1
            return int(self._ints["step_id"][place]) if place >= 0 else None

    def neighbour(self, at_ns: int, offset: int) -> int | None:
        """When the step that is `offset` steps from the one at `at_ns` ended; None beyond either end."""
        with self._lock:
            ended = self._ints["ended_ns"][: self._size]
            place = int(np.searchsorted(ended, at_ns, side="right")) - 1 + offset
            return int(ended[place]) if 0 <= place < len(ended) else None

    def around(self, at_ns: int, before: int, after: int) -> dict[str, NDArray[Any]]:
        """Copies of all columns for the steps next to a time: at most ``before + after`` rows."""
        with self._lock:
            ended = self._ints["ended_ns"][: self._size]
            place = int(np.searchsorted(ended, at_ns, side="right"))
            part = slice(max(0, place - before), min(self._size, place + after))
            return {name: column[part].copy() for name, column in (self._ints | self._floats).items()}

    def window(self, since_ns: int, until_ns: int) -> dict[str, NDArray[Any]]:
        """Copies of all columns for the steps that ended in [since, until)."""
        with self._lock:
            low, high = np.searchsorted(self._ints["ended_ns"][: self._size], (since_ns, until_ns))
            part = slice(int(low), int(high))
            return {name: column[part].copy() for name, column in (self._ints | self._floats).items()}

    def arrays(self, since_ns: int, until_ns: int) -> StepArrays:
        """The steps that ended in [since, until), for ``engine.limits``."""
        columns = self.window(since_ns, until_ns)
        needs = {name: columns[name].astype(np.float64) for name in _NEEDS}
        return StepArrays(
            columns["started_ns"], columns["ended_ns"], (columns["forward"] + columns["sample"]).astype(np.float64) / 1e3,
            **needs, leaves_work=columns["running"] + columns["waiting"] > 0,
        )  # fmt: skip

    def bins(self, since_ns: int, until_ns: int, num_bins: int = 240) -> Bins:
        """The window [since, until) in `num_bins` equal bins, by the time a step ended."""
        num_bins = min(num_bins, MAX_BINS)
        with self._lock:
            ended = self._ints["ended_ns"][: self._size]
            low, high = np.searchsorted(ended, (since_ns, until_ns))
            part = slice(int(low), int(high))
            place = ((ended[part] - since_ns) * num_bins // max(1, until_ns - since_ns)).astype(np.int64)
            ids = self._ints["step_id"][part]
            floats = {name: self._floats[name][part].astype(np.float64) for name in _BINNED}
            before = {name: float(self._floats[name][low - 1]) if low else np.nan for name in _GAUGES}
        return _binned(place, ids, floats, before, since_ns, until_ns, num_bins)


def _binned(
    place: NDArray[np.int64],
    ids: NDArray[np.int64],
    floats: dict[str, NDArray[np.float64]],
    before: dict[str, float],
    since_ns: int,
    until_ns: int,
    num_bins: int,
) -> Bins:
    num_steps = np.bincount(place, minlength=num_bins).astype(np.int64)
    last_id = np.full(num_bins, -1, np.int64)
    last_id[place] = ids  # steps are in order: the last write of a bin wins
    seconds = (until_ns - since_ns) / num_bins / 1e9
    some = num_steps > 0
    starts = np.flatnonzero(np.diff(place, prepend=-1)) if len(place) else np.zeros(0, np.int64)
    values: dict[str, NDArray[np.float64]] = {}
    for name in _SUMS:
        values[name] = np.bincount(place, floats[name], num_bins) / seconds
    for name in _MEANS:
        values[name] = np.full(num_bins, np.nan)
        values[name][some] = np.bincount(place, floats[name], num_bins)[some] / num_steps[some]
    held = np.concatenate([[0], np.cumsum(some)])[1:]  # how many bins with steps there were up to each bin
    for name in _GAUGES:
        peaks = np.maximum.reduceat(floats[name], starts) if len(starts) else np.zeros(0)
        last = floats[name][np.append(starts[1:], len(place)) - 1] if len(starts) else np.zeros(0)
        values[name] = np.concatenate([[before[name]], last])[held]
        values[name][some] = peaks
    return Bins(since_ns, until_ns, num_steps, last_id, values)
