"""The request log: every request once, whatever happens to the process, the disk or the queue."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from engine.records import EngineEvent, RequestRecord
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from workbench.host import fake_worker
from workbench.observe import request_reader, segments
from workbench.observe.errors import RequestLogError
from workbench.observe.request_log import RequestLog
from workbench.observe.request_row import COLUMNS

WRITER = Path(__file__).with_name("log_writer.py")
ROOT = Path(__file__).resolve().parents[3]


def record(request_id: str, *, ago_s: float = 0.0, error: str | None = None) -> RequestRecord:
    now = time.monotonic_ns() - int(ago_s * 1e9)
    reason = FinishReason.ERROR if error else FinishReason.LENGTH
    tokens = (now - 60_000_000, now - 30_000_000, now)
    return RequestRecord(
        request_id, now - 100_000_000, now - 80_000_000, tokens[0], now, 11, 4, 3, 1, reason, tokens, error
    )


def test_rows_hold_the_figures_of_the_record(tmp_path):
    with RequestLog(tmp_path) as log:
        log.sink("m/3", "abc").on_request(record("r1"))
    (row,) = request_reader.read(tmp_path).to_pylist()
    assert list(row) == list(COLUMNS)
    assert (row["request_id"], row["model"], row["version_digest"]) == ("r1", "m/3", "abc")
    assert (row["num_prompt_tokens"], row["num_cached_tokens"], row["num_output_tokens"]) == (11, 4, 3)
    assert row["queue_ms"] == pytest.approx(20)
    assert row["ttft_ms"] == pytest.approx(40)
    assert row["tpot_ms"] == pytest.approx(30)
    assert row["e2e_ms"] == pytest.approx(100)
    assert row["finish_reason"] == "length"
    assert abs(row["finished_at"] - datetime.now(UTC)) < timedelta(seconds=30)
    assert row["prompt"] is None


def test_every_request_of_a_real_engine_thread_is_logged(tmp_path):
    worker = fake_worker(delay_s=0.0)
    with RequestLog(tmp_path, max_segment_rows=50) as log:
        worker.add_sink(log.sink("fake", ""))
        worker.start()
        params = SamplingParams(max_tokens=3)
        results = [stream.result() for stream in worker.submit_all(["hello"] * 120, [params] * 120)]
        worker.close()
    rows = RequestLog.read(tmp_path)
    assert sorted(rows["request_id"]) == sorted(result.request_id for result in results)
    by_id = rows.set_index("request_id")
    for result in results:
        assert by_id.loc[result.request_id, "ttft_ms"] == pytest.approx(result.ttft_ms, abs=1e-6)
        assert by_id.loc[result.request_id, "tpot_ms"] == pytest.approx(result.tpot_ms, abs=1e-6)


def test_requests_of_a_dying_engine_are_logged_as_errors(tmp_path):
    with RequestLog(tmp_path) as log:
        lost = EngineEvent("dead", time.monotonic_ns(), "device lost", ("a", "b"), (None, "adapter"))
        for sink in (log.sink("m", ""), log.sink("m/1", "", "adapter")):
            sink.on_event(lost)
    rows = RequestLog.read(tmp_path)
    assert dict(zip(rows["request_id"], rows["model"])) == {"a": "m", "b": "m/1"}
    assert set(rows["error"]) == {"device lost"}
    assert set(rows["finish_reason"]) == {"error"}


def test_journal_and_parquet_are_read_as_one_without_duplicates(tmp_path):
    with RequestLog(tmp_path, max_segment_rows=10) as log:
        for number in range(25):
            ticket = log.expect(f"r{number}")
            log.sink("m", "").on_request(record(f"r{number}"))
            assert ticket.wait(5)
        deadline = time.monotonic() + 5
        while len(segments.parquet_files(log.folder)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(segments.parquet_files(log.folder)) == 2
        assert len(segments.journals(log.folder)) == 1  # still being written
        assert list(RequestLog.read(tmp_path)["request_id"]) == [
            f"r{number}" for number in reversed(range(25))
        ]
        assert list(RequestLog.read(tmp_path, limit=7)["request_id"]) == [
            f"r{number}" for number in range(24, 17, -1)
        ]
    assert segments.journals(log.folder) == []
    assert len(RequestLog.read(tmp_path)) == 25


def test_a_crash_between_rename_and_removal_shows_each_row_once(tmp_path):
    folder = segments.folder_of(tmp_path)
    with RequestLog(tmp_path) as log:
        log.sink("m", "").on_request(record("r1"))
        ticket = log.expect("r2")
        log.sink("m", "").on_request(record("r2"))
        assert ticket.wait(5)
        (journal,) = segments.journals(folder)
        content = journal.read_bytes()
    journal.write_bytes(content)  # as if the process had died before it removed the journal
    assert len(segments.parquet_files(folder)) == 1
    assert sorted(RequestLog.read(tmp_path)["request_id"]) == ["r1", "r2"]
    RequestLog(tmp_path).close()  # the next start tidies up
    assert segments.journals(folder) == []
    assert sorted(RequestLog.read(tmp_path)["request_id"]) == ["r1", "r2"]


def test_a_line_that_a_crash_cut_off_is_not_a_row(tmp_path):
    folder = segments.folder_of(tmp_path)
    folder.mkdir()
    whole = {"row": "x-1", "request_id": "whole", "finished_at": 1_700_000_000_000_000}
    (folder / f"requests-20260101T000000-1{segments.JOURNAL}").write_text(
        json.dumps(whole) + "\n" + '{"row": "x-2", "request_id": "ha'
    )
    assert list(RequestLog.read(tmp_path)["request_id"]) == ["whole"]
    RequestLog(tmp_path).close()
    assert list(RequestLog.read(tmp_path)["request_id"]) == ["whole"]
    assert segments.journals(folder) == []


def test_a_file_that_is_none_hides_no_request(tmp_path, caplog, fault):
    for name in ("r1", "lost"):
        with RequestLog(tmp_path) as log:
            log.sink("m", "").on_request(record(name))
    broken = segments.parquet_files(segments.folder_of(tmp_path))[-1]
    content = broken.read_bytes()
    broken.write_bytes(
        content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :]
    )  # its footer is whole
    (segments.folder_of(tmp_path) / f"requests-20990101T000000-1{segments.PARQUET}").write_bytes(
        b"not parquet"
    )
    assert list(RequestLog.read(tmp_path, limit=5)["request_id"]) == ["r1"]
    assert caplog.text.count("left out") == 2
    fault(
        "a segment of the request log is truncated or overwritten", fails="nothing",
        goes_on="all; reading the log leaves the file out, with a warning that names it", afterwards="the rows of all other files",
    )  # fmt: skip


def test_an_id_used_twice_gives_two_rows(tmp_path):
    with RequestLog(tmp_path) as log:
        log.sink("m", "").on_request(record("same"))
        log.sink("m", "").on_request(record("same"))
    assert list(RequestLog.read(tmp_path)["request_id"]) == ["same", "same"]


def test_since_and_limit_select_the_newest(tmp_path):
    for ago_s in (300, 200, 100):  # three files
        with RequestLog(tmp_path) as log:
            log.sink("m", "").on_request(record(f"old{ago_s}", ago_s=ago_s))
    with RequestLog(tmp_path) as log:
        log.sink("m", "").on_request(record("now"))
        since = datetime.now(UTC) - timedelta(seconds=150)
    assert list(RequestLog.read(tmp_path, since=since)["request_id"]) == ["now", "old100"]
    assert list(RequestLog.read(tmp_path, since=since.isoformat(), limit=1)["request_id"]) == ["now"]
    assert list(RequestLog.read(tmp_path, limit=3)["request_id"]) == ["now", "old100", "old200"]


def test_bad_questions_are_refused(tmp_path):
    with pytest.raises(RequestLogError, match="no time"):
        RequestLog.read(tmp_path, since="yesterday")
    with pytest.raises(RequestLogError, match="limit"):
        RequestLog.read(tmp_path, limit=0)
    with pytest.raises(RequestLogError, match="policy"):
        RequestLog(tmp_path, text="some")  # type: ignore[arg-type]
    assert RequestLog.read(tmp_path).empty


@pytest.mark.parametrize(
    ("policy", "prompt"),
    [
        ("off", None),
        ("redacted", "write to [email] \N{REPLACEMENT CHARACTER}"[:-1] + "?"),
        ("full", "write to ada@example.org ?"),
    ],
)
@pytest.mark.parametrize("text_first", [True, False])
def test_text_is_kept_as_the_policy_says(tmp_path, policy, prompt, text_first):
    """Half a surrogate pair in the text, which JSON lets in, costs its own character only."""
    with RequestLog(tmp_path, text=policy) as log:
        steps = [
            lambda: log.add_text("r", "write to ada@example.org \ud800", "fine"),
            lambda: log.sink("m", "").on_request(record("r")),
        ]
        for step in steps if text_first else reversed(steps):
            ticket = log.expect("r")
            step()
            ticket.wait(0.3)
    (row,) = request_reader.read(tmp_path).to_pylist()
    assert row["prompt"] == prompt
    assert row["output"] == (None if policy == "off" else "fine")


def test_redacted_text_is_on_no_file_before_it_is_redacted(tmp_path):
    with RequestLog(tmp_path, text="redacted") as log:
        log.add_text("r", "key sk-abcdefghijklmnop0123456789", "ok")
        ticket = log.expect("r")
        log.sink("m", "").on_request(record("r"))
        assert ticket.wait(5)
        (journal,) = segments.journals(log.folder)
        assert b"abcdefghijklmnop" not in journal.read_bytes()
        assert b"[key]" in journal.read_bytes()


def test_an_answer_can_wait_for_its_row_on_the_event_loop(tmp_path):
    async def answer(log: RequestLog) -> tuple[bool, bool]:
        ticket, never = log.expect("r"), log.expect("never")
        threading.Timer(0.05, lambda: log.sink("m", "").on_request(record("r"))).start()
        return await ticket.written(5), await never.written(0.05)

    with RequestLog(tmp_path) as log:
        assert asyncio.run(answer(log)) == (True, False)
        assert list(RequestLog.read(tmp_path)["request_id"]) == ["r"]


def test_a_full_disk_loses_nothing_that_fits_the_queue(tmp_path, monkeypatch, fault):
    """The system's write fails, as on a full disk, in the middle of a line; later it works again."""
    true_pwrite, failing = os.pwrite, threading.Event()

    def pwrite(handle: int, data: bytes, offset: int) -> int:
        if failing.is_set():
            true_pwrite(handle, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return true_pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with RequestLog(tmp_path) as log:
        first = log.expect("before")
        log.sink("m", "").on_request(record("before"))
        assert first.wait(5)
        failing.set()
        tickets = [log.expect(f"r{number}") for number in range(20)]
        for number in range(20):
            log.sink("m", "").on_request(record(f"r{number}"))
        assert not tickets[-1].wait(0.2)
        assert "No space" in (log.status().error or "")
        assert list(RequestLog.read(tmp_path)["request_id"]) == ["before"]  # no half row
        failing.clear()
        assert tickets[-1].wait(5)
        assert log.status().error is None
        assert log.status().num_dropped == 0
    assert len(RequestLog.read(tmp_path)) == 21
    fault(
        "the disk is full: request log", fails="nothing; answers wait a moment for their rows and are then sent without",
        goes_on="all: rows wait in memory for room, and what exceeds that is counted as dropped",
        afterwards="no half row; every row that waited is written when there is room",
    )  # fmt: skip


def test_an_overflow_is_counted_and_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with RequestLog(tmp_path, max_queued=10) as log:
        for number in range(50):
            log.sink("m", "").on_request(record(f"r{number}"))
            time.sleep(0.001)
        deadline = time.monotonic() + 5
        while log.status().num_dropped == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        status = log.status()
        assert status.num_dropped >= 20
        assert status.num_queued + status.num_dropped == 50
    assert "request" in caplog.text


def test_the_engine_thread_never_waits_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "pwrite", lambda *_: time.sleep(0.5) or (_ for _ in ()).throw(OSError(errno.EIO, "slow"))
    )
    with RequestLog(tmp_path) as log:
        sink, slowest = log.sink("m", ""), 0
        for number in range(200):
            began = time.perf_counter_ns()
            sink.on_request(record(f"r{number}"))
            slowest = max(slowest, time.perf_counter_ns() - began)
        assert slowest < 400_000_000  # the disk hangs for 500 ms each time


def test_two_processes_and_a_live_journal_are_left_alone(tmp_path):
    with RequestLog(tmp_path) as first:
        ticket = first.expect("one")
        first.sink("m", "").on_request(record("one"))
        assert ticket.wait(5)
        with RequestLog(tmp_path) as second:
            second.sink("m", "").on_request(record("two"))
        assert (
            len(segments.journals(first.folder)) == 1
        )  # the second start did not take the first one's journal
        assert sorted(RequestLog.read(tmp_path)["request_id"]) == ["one", "two"]
        late = first.expect("three")
        first.sink("m", "").on_request(record("three"))
        assert late.wait(5)
    assert sorted(RequestLog.read(tmp_path)["request_id"]) == ["one", "three", "two"]


@pytest.mark.full
def test_sigkill_at_random_moments_loses_no_acknowledged_request(tmp_path):
    """Segments of 40 rows, so that kills hit appends, syncs, compactions, renames and removals alike."""
    generator = random.Random(0)
    acknowledged: set[str] = set()
    for kill in range(8):
        process = subprocess.Popen(
            [sys.executable, str(WRITER), str(tmp_path), ("off", "full")[kill % 2]],
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(generator.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines(keepends=True)
        process.wait()
        process.stdout.close()
        acknowledged |= {line.strip() for line in lines if line.endswith("\n")}
        rows = RequestLog.read(tmp_path)
        assert acknowledged <= set(rows["request_id"])
        assert rows["row"].is_unique
        assert rows["request_id"].is_unique
        assert rows["e2e_ms"].notna().all()
    RequestLog(tmp_path).close()
    folder = segments.folder_of(tmp_path)
    assert segments.journals(folder) == []
    kept = [
        name for path in segments.parquet_files(folder) for name in pq.read_table(path)["row"].to_pylist()
    ]
    rows = RequestLog.read(tmp_path)
    assert set(kept) == set(rows["row"])
    assert acknowledged <= set(rows["request_id"])
    assert len(acknowledged) > 50
