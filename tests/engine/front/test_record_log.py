"""The last minutes of an engine, replayed: block ownership at any step equals what it was then."""

from __future__ import annotations

import pickle
import random
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from engine import Engine, EngineEvent, FinishReason, RequestRecord, SamplingParams, StepRecord
from engine.record_log import MAX_EVENTS, SEGMENT_LENGTH, RecordLog
from engine.records import BlockEvent, BlockEventKind, BlockKeyframe

SECOND = 1_000_000_000


def step(step_id: int, at_s: float = 0.0, **values: object) -> StepRecord:
    at = int(at_s * SECOND)
    record = StepRecord(step_id, at - 1, at, 0.1, 0.1, 1.0, 0.1, (("a", 1),), 0, 1, 0, 1, 10, 0)
    return replace(record, **values)  # type: ignore[arg-type]


def keyframe_of(owners: dict[str, tuple[int, ...]], published: set[int] = frozenset()) -> BlockKeyframe:  # type: ignore[assignment]
    tables = {request_id: (table, len(table)) for request_id, table in owners.items()}
    return BlockKeyframe(tables, np.packbits([i in published for i in range(64)]).tobytes())


def request(request_id: str, at_s: float) -> RequestRecord:
    return RequestRecord(request_id, 0, 1, 2, int(at_s * SECOND), 3, 0, 4, 0, FinishReason.STOP, (1, 2, 3, 4))


def test_block_maps_of_a_busy_engine_equal_what_was_owned_then(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine({"num_blocks": 40, "block_size": 4, "max_num_seqs": 8, "max_batched_tokens": 32})
    log = RecordLog(600, 40)
    draw = random.Random(5)
    truth: dict[int, tuple[dict[str, tuple[int, ...]], frozenset[int]]] = {}
    preempted = shared = 0
    for turn in range(900):
        if turn % 3 == 0 and engine.stats().num_waiting < 4:
            prompt = [1] * 12 + [draw.randrange(2, 200) for _ in range(draw.randrange(1, 20))]
            engine.add(
                engine.make_request(prompt, SamplingParams(max_tokens=draw.randrange(1, 60), ignore_eos=True))
            )
        record = engine.step().record
        if record is None:
            continue
        log.on_step(record)
        preempted += len(record.preempted)
        scheduler = engine._scheduler
        owners = {seq.request_id: tuple(seq.block_ids) for seq in scheduler.running if seq.block_ids}
        truth[record.step_id] = owners, frozenset(scheduler.blocks.pool.published_ids())
    assert preempted > 0, "the pool was never short: the test proves less than it says"
    assert len(truth) > 2 * SEGMENT_LENGTH, "no keyframe but the first was used"
    for step_id, (owners, published) in truth.items():
        found = log.block_map(step_id)
        assert found is not None
        assert ({k: v for k, v in found.owners.items() if v}, found.published) == (owners, published), (
            f"step {step_id}"
        )
        held = {block for table in owners.values() for block in table}
        assert found.cached == published - held
        assert found.num_free == 40 - len(held | published)
        shared += len(found.shared)
    assert shared > 0, "no prefix was ever shared"
    newest = log.block_map()
    assert newest == log.block_map(max(truth))


def test_a_new_log_shows_an_empty_pool() -> None:
    log = RecordLog(600, 7)
    empty = log.block_map()
    assert empty is not None
    assert (empty.owners, empty.num_free, empty.step_id) == ({}, 7, -1)
    assert log.block_map(0) is None
    assert (log.steps(), log.requests(), log.events(), log.last_step()) == ([], [], [], None)


def test_a_keyframe_replaces_what_came_before_it() -> None:
    log = RecordLog(600, 10)
    log.on_step(step(0, block_events=(BlockEvent(BlockEventKind.ACQUIRE, "a", (1, 2)),)))
    log.on_step(step(1, block_events=(BlockEvent(BlockEventKind.PUBLISH, "a", (1,)),)))
    log.on_step(step(2, keyframe=keyframe_of({"a": (1, 2), "b": (5,)}, {1})))
    log.on_step(step(3, block_events=(BlockEvent(BlockEventKind.RELEASE, "a"),)))
    tables = [log.block_map(i).owners for i in range(4)]  # type: ignore[union-attr]
    assert tables == [{"a": (1, 2)}, {"a": (1, 2)}, {"a": (1, 2), "b": (5,)}, {"b": (5,)}]
    last = log.block_map(3)
    assert last is not None
    assert (last.cached, last.num_free) == ({1}, 8)
    assert pickle.loads(pickle.dumps(last)) == last
    assert log.block_map(4) is None


def test_old_steps_leave_and_the_rest_can_still_be_replayed() -> None:
    log = RecordLog(10, 4)
    for i in range(4 * SEGMENT_LENGTH):
        keyframe = keyframe_of({"a": (i % 4,)}) if i and i % SEGMENT_LENGTH == 0 else None
        log.on_step(step(i, i / 32, keyframe=keyframe))  # 32 steps a second: a segment lasts 8 s
    kept = log.steps()
    assert kept[-1].step_id == 4 * SEGMENT_LENGTH - 1
    # Segments leave whole, when a new one begins: the last began at 24 s, and the second reached beyond 14 s.
    assert kept[0].step_id == SEGMENT_LENGTH
    assert log.block_map(0) is None
    found = log.block_map(kept[0].step_id)
    assert found is not None
    assert found.owners == {"a": (0,)}


def test_memory_is_bounded_however_fast_the_engine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.record_log.MAX_STEP_WEIGHT", 50_000)
    log = RecordLog(600, 4)
    rows = tuple((f"r{i}", 1) for i in range(100))
    for i in range(5000):
        keyframe = keyframe_of({}) if i % 50 == 0 else None
        log.on_step(step(i, i / 1e5, rows=rows, keyframe=keyframe))
    assert 300 < len(log.steps()) < 600
    for i in range(3 * MAX_EVENTS):
        log.on_event(EngineEvent("x", i))
    assert [event.at_ns for event in log.events()] == list(range(2 * MAX_EVENTS, 3 * MAX_EVENTS))


def test_slices_by_time_are_those_of_a_plain_filter() -> None:
    log = RecordLog(600, 4)
    steps = [step(i, i // 3) for i in range(2000)]  # three steps share a time
    for record in steps:
        log.on_step(record)
    requests = [request(f"r{i}", i / 2) for i in range(1000)]
    for done in requests:
        log.on_request(done)
    for since, until in [
        (None, None),
        (100, None),
        (None, 50),
        (66, 300),
        (300, 66),
        (9999, None),
        (None, -1),
    ]:
        low = None if since is None else since * SECOND
        high = None if until is None else until * SECOND

        def fits(at: int, low: int | None = low, high: int | None = high) -> bool:
            return (low is None or at >= low) and (high is None or at <= high)

        # Until something is dropped, the ring holds everything within its horizon of the newest record.
        kept = {record.step_id for record in log.steps()}
        assert log.steps(low, high) == [s for s in steps if fits(s.ended_ns) and s.step_id in kept]
        assert log.requests(low, high) == [r for r in requests if fits(r.finished_ns)]


def test_readers_need_no_lock_while_the_engine_writes() -> None:
    log = RecordLog(1, 64)
    failures: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            ids = [record.step_id for record in log.steps()]
            if ids != list(range(ids[0], ids[0] + len(ids))) if ids else False:
                failures.append(f"a gap in {ids[:3]}…{ids[-3:]}")
            newest = log.block_map()
            if newest is None or newest.owners.get("a", (newest.step_id % 64,)) != (newest.step_id % 64,):
                failures.append(f"torn map {newest}")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    readers = [threading.Thread(target=read) for _ in range(3)]
    try:
        for reader in readers:
            reader.start()
        for i in range(6000):
            events = (
                BlockEvent(BlockEventKind.RELEASE, "a"),
                BlockEvent(BlockEventKind.ACQUIRE, "a", (i % 64,)),
            )
            keyframe = keyframe_of({"a": (i % 64,)}) if i % 100 == 0 else None
            log.on_step(step(i, i / 1000, block_events=events, keyframe=keyframe))
    finally:
        stop.set()
        for reader in readers:
            reader.join()
        sys.setswitchinterval(before)
    assert not failures, failures[:3]
