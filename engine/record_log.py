"""RecordLog: the last minutes of an engine in memory, for pages, metrics and scrubbing back.

One writer (the engine thread) appends; any number of readers take slices. No locks: records are immutable, lists are only
appended to, and whole segments are dropped by replacing a tuple. Bounded twice: by time (`record_seconds`) and by a weight
that stands for bytes, so that a fast engine with many rows cannot fill the memory.

Boundary: memory only. What must outlast the process is written by another sink.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, TypeVar

from engine.records import BlockEventKind, EngineEvent, RequestRecord, StepRecord

SEGMENT_LENGTH = 256  # records a segment; steps begin a new one at each keyframe
MAX_STEP_WEIGHT = 4_000_000  # rows and block events held, about 64 bytes each at worst
MAX_REQUEST_WEIGHT = 2_000_000  # tokens' times held, about 36 bytes each
MAX_EVENTS = 1000

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True)
class BlockMap:
    """Who holds which KV block after one step."""

    step_id: int  # -1: before the first step
    num_blocks: int
    # request_id -> its block table, in token order; shared blocks appear in several
    owners: dict[str, tuple[int, ...]]
    published: frozenset[int]  # matchable, held or not
    cached: frozenset[int] = field(init=False)  # matchable and held by nobody
    shared: frozenset[int] = field(init=False)  # held by more than one request
    num_free: int = field(init=False)  # neither held nor matchable

    def __post_init__(self) -> None:
        seen: set[int] = set()
        shared: set[int] = set()
        for table in self.owners.values():
            shared.update(seen.intersection(table))
            seen.update(table)
        object.__setattr__(self, "cached", self.published - seen)
        object.__setattr__(self, "shared", frozenset(shared))
        object.__setattr__(self, "num_free", self.num_blocks - len(seen) - len(self.cached))


class RecordLog:
    """The ring of records. Is itself a Sink: the engine thread calls ``on_*``, everyone else only reads."""

    def __init__(self, record_seconds: int, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        horizon_ns = record_seconds * 1_000_000_000
        self._steps: _Ring[StepRecord] = _Ring(horizon_ns, MAX_STEP_WEIGHT, attrgetter("ended_ns"))
        self._requests: _Ring[RequestRecord] = _Ring(
            horizon_ns, MAX_REQUEST_WEIGHT, attrgetter("finished_ns")
        )
        self._events: deque[EngineEvent] = deque(maxlen=MAX_EVENTS)

    def on_step(self, record: StepRecord) -> None:
        weight = 8 + len(record.rows) + sum(1 + len(event.block_ids) for event in record.block_events)
        self._steps.append(record, weight, begins_segment=record.keyframe is not None)

    def on_request(self, record: RequestRecord) -> None:
        self._requests.append(record, 8 + len(record.token_ns))

    def on_event(self, event: EngineEvent) -> None:
        self._events.append(event)

    def steps(self, since_ns: int | None = None, until_ns: int | None = None) -> list[StepRecord]:
        """Steps that ended within [since_ns, until_ns], oldest first; monotonic nanoseconds."""
        return self._steps.between(since_ns, until_ns)

    def requests(self, since_ns: int | None = None, until_ns: int | None = None) -> list[RequestRecord]:
        """Requests that finished within [since_ns, until_ns], in the order in which they finished."""
        return self._requests.between(since_ns, until_ns)

    def events(self) -> list[EngineEvent]:
        """The last events, oldest first."""
        return list(self._events)

    def last_step(self) -> StepRecord | None:
        """The newest step."""
        return self._steps.last()

    def block_map(self, step_id: int | None = None) -> BlockMap | None:
        """Ownership of the KV blocks after a step (None: the newest), replayed from a keyframe and the deltas since.

        None when that step is not in memory: never recorded, or older than the ring holds. Before the first step the
        newest map is the empty pool.
        """
        segment = self._steps.segment_of(step_id)
        if segment is None:
            empty = step_id is None and self._steps.is_new
            return BlockMap(-1, self._num_blocks, {}, frozenset()) if empty else None
        return self._replay(segment, step_id)

    def _replay(self, segment: _Segment[StepRecord], step_id: int | None) -> BlockMap | None:
        first = segment.records[0]
        owners: dict[str, list[int]] = {}
        published: set[int] = set()
        if first.keyframe is not None:
            owners = {request_id: list(table) for request_id, table in first.keyframe.owners.items()}
            published = set(first.keyframe.published)
        elif not segment.is_first:
            return None
        at = -1
        for record in list(segment.records):
            if step_id is not None and record.step_id > step_id:
                break
            at = record.step_id
            if record.keyframe is None:
                _apply(record, owners, published)
        if step_id is not None and at != step_id:
            return None
        tables = {request_id: tuple(table) for request_id, table in owners.items()}
        return BlockMap(at, self._num_blocks, tables, frozenset(published))


def _apply(record: StepRecord, owners: dict[str, list[int]], published: set[int]) -> None:
    for event in record.block_events:
        if event.kind is BlockEventKind.RELEASE:
            owners.pop(event.request_id, None)
        elif event.kind is BlockEventKind.PUBLISH:
            published.update(event.block_ids)
        else:
            owners.setdefault(event.request_id, []).extend(event.block_ids)
            if event.kind is BlockEventKind.ACQUIRE:
                published.difference_update(event.block_ids)


class _Segment(Generic[_Record]):
    """Records in a row. Only the writer appends, only to the newest segment."""

    __slots__ = ("is_first", "records", "weight")

    def __init__(self, record: _Record, weight: int, is_first: bool) -> None:
        self.records = [record]
        self.weight = weight
        self.is_first = is_first  # nothing came before it: a replay may start from the empty pool


class _Ring(Generic[_Record]):
    """Records by time, in segments that are dropped whole. One writer, many readers, no lock."""

    def __init__(self, horizon_ns: int, max_weight: int, time_of: Callable[[_Record], int]) -> None:
        self._horizon_ns = horizon_ns
        self._max_weight = max_weight
        self._time_of = time_of
        self._segments: tuple[_Segment[_Record], ...] = ()  # replaced, never changed
        self._weight = 0
        self.is_new = True  # nothing was ever appended

    def append(self, record: _Record, weight: int, begins_segment: bool = False) -> None:
        segments = self._segments
        self._weight += weight
        if segments and not begins_segment and len(segments[-1].records) < 2 * SEGMENT_LENGTH:
            segments[-1].weight += weight
            segments[-1].records.append(record)
            return
        kept = self._without_old(segments, self._time_of(record) - self._horizon_ns)
        self._segments = (*kept, _Segment(record, weight, self.is_new))
        self.is_new = False

    def _without_old(
        self, segments: tuple[_Segment[_Record], ...], oldest_ns: int
    ) -> Iterable[_Segment[_Record]]:
        drop = 0
        for segment in segments:
            if self._time_of(segment.records[-1]) >= oldest_ns and self._weight <= self._max_weight:
                break
            self._weight -= segment.weight
            drop += 1
        return segments[drop:]

    def last(self) -> _Record | None:
        segments = self._segments
        return segments[-1].records[-1] if segments else None

    def between(self, since_ns: int | None, until_ns: int | None) -> list[_Record]:
        found: list[_Record] = []
        for segment in self._segments:
            records = segment.records
            if since_ns is not None and self._time_of(records[-1]) < since_ns:
                continue
            if until_ns is not None and self._time_of(records[0]) > until_ns:
                break
            low = 0 if since_ns is None else bisect_left(records, since_ns, key=self._time_of)
            high = len(records) if until_ns is None else bisect_right(records, until_ns, key=self._time_of)
            found += records[low:high]
        return found

    def segment_of(self, step_id: int | None) -> _Segment[_Record] | None:
        """The newest segment, or the one that a step of that id would be in."""
        segments = self._segments
        if step_id is None or not segments:
            return segments[-1] if segments else None
        ids = [getattr(segment.records[0], "step_id", 0) for segment in segments]
        at = bisect_right(ids, step_id) - 1
        return segments[at] if at >= 0 else None
