"""Erase: what is kept of somebody is gone from every place, nobody else's is, and a crash in the middle is finished by a rerun."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.records import RequestRecord
from engine.request import FinishReason
from workbench.access import audit
from workbench.observe import feedback, request_reader, segments
from workbench.observe.erase import Erasure, Subject, erase
from workbench.observe.errors import EraseError
from workbench.observe.request_log import RequestLog
from workbench.observe.request_row import COLUMNS
from workbench.settings import Settings
from workbench.store import Store, open_store

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path) as opened:
        yield opened


def log_request(log: RequestLog, request_id: str, user: str, session: str = "") -> None:
    now = time.monotonic_ns()
    ticket = log.expect(request_id, {"user": user, "session": session} if session else {"user": user})
    log.add_text(request_id, f"prompt of {user}", f"answer to {user}")
    log.sink("m", "").on_request(
        RequestRecord(request_id, now, now, now, now, 1, 0, 1, 0, FinishReason.STOP, (now,))
    )
    assert ticket.wait(5)


def erased(home: Path, store: Store, kind: Any, name: str, **options: Any) -> Erasure:
    settings = Settings(home_dir=home)
    return erase(settings, store, Subject(kind, name), with_mlflow=False, **options)


def on_disk(home: Path) -> bytes:
    """Every byte of the log: Parquet files uncompressed, by their rows."""
    folder = segments.folder_of(home)
    rows = [pq.read_table(path).to_pylist() for path in segments.parquet_files(folder)]
    return repr(rows).encode() + b"".join(path.read_bytes() for path in segments.journals(folder))


def test_a_user_is_gone_from_closed_files_the_live_journal_feedback_and_datasets(
    tmp_path: Path, store: Store
) -> None:
    datasets = tmp_path / "datasets"
    datasets.mkdir()
    lines = [
        {"id": "a2", "messages": []},
        {"id": "x", "messages": [], "tags": {"user": "ada"}},
        {"id": "b1", "messages": []},
    ]
    (datasets / "made.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "no example\n")
    with RequestLog(tmp_path, text="full", max_segment_rows=3) as log:
        for number in range(4):  # the last of each in the journal that is being written
            log_request(log, f"a{number}", "ada", "s")
            log_request(log, f"b{number}", "bob", "t")
        for request_id, user in (("a1", "bob"), ("b1", "ada"), ("b2", "bob")):
            feedback.record(store, request_id, "thumbs", "up", user=user)
        before = on_disk(tmp_path)
        planned = erased(tmp_path, store, "user", "ada", dry_run=True)
        assert on_disk(tmp_path) == before
        done = erased(tmp_path, store, "user", "ada", rotate=lambda subject: log.rotate(subject.owns))
        assert b"ada" in before
        assert b"ada" not in on_disk(tmp_path)
        log_request(log, "b4", "bob")
    counts = (done.requests, done.feedback, done.dataset_examples)
    assert counts == (planned.requests, planned.feedback, planned.dataset_examples) == (4, 2, 2)
    rows = request_reader.read(tmp_path).to_pylist()
    assert sorted(row["request_id"] for row in rows) == [f"b{number}" for number in range(5)]
    assert {row["output"] for row in rows} == {"answer to bob"}
    assert [item.request_id for item in feedback.list_feedback(store)] == ["b2"]
    [told] = audit.latest(store)
    assert (told.act, told.outcome) == ("erase", "ok")
    assert "4 requests, 2 feedback" in told.detail
    assert "ada" not in repr(told)
    assert (datasets / "made.jsonl").read_text() == json.dumps(lines[2]) + "\nno example\n"


def test_a_session_or_a_request_with_its_choices_goes_and_its_neighbours_stay(
    tmp_path: Path, store: Store
) -> None:
    with RequestLog(tmp_path) as log:
        for request_id in ("r", "r-1", "r-12", "r-x", "rr", "q"):
            log_request(log, request_id, "ada", "s1" if request_id == "q" else "s2")
    assert erased(tmp_path, store, "request", "chatcmpl-r").requests == 3
    assert erased(tmp_path, store, "session", "s1").requests == 1
    assert sorted(row["request_id"] for row in request_reader.read(tmp_path).to_pylist()) == ["r-x", "rr"]
    with pytest.raises(EraseError, match="no name"):
        Subject("user", " ")


def test_a_text_that_comes_after_the_erasure_brings_nothing_back(tmp_path: Path, store: Store) -> None:
    with RequestLog(tmp_path, text="full") as log:
        now = time.monotonic_ns()
        ticket = log.expect("late", {"user": "ada"})
        log.sink("m", "").on_request(
            RequestRecord("late", now, now, now, now, 1, 0, 1, 0, FinishReason.STOP, (now,))
        )
        assert ticket.wait(5)
        erased(tmp_path, store, "user", "ada", rotate=lambda subject: log.rotate(subject.owns))
        log.add_text("late", "prompt of ada", "answer to ada")
        log_request(log, "b", "bob")
    assert [row["request_id"] for row in request_reader.read(tmp_path).to_pylist()] == ["b"]
    assert b"ada" not in on_disk(tmp_path)


def test_a_crash_between_two_files_leaves_each_whole_and_a_rerun_finishes(
    tmp_path: Path, store: Store, monkeypatch: Any
) -> None:
    for part in range(4):
        with RequestLog(tmp_path) as log:
            log_request(log, f"a{part}", "ada")
            log_request(log, f"b{part}", "bob")
    true_replace, calls = os.replace, iter(range(100))

    def replace(source: Any, target: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        true_replace(source, target)

    with monkeypatch.context() as crash:
        crash.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            erased(tmp_path, store, "user", "ada")
    half = sorted(row["request_id"] for row in request_reader.read(tmp_path).to_pylist())
    assert half == ["a2", "a3", "b0", "b1", "b2", "b3"]
    assert erased(tmp_path, store, "user", "ada").requests == 2
    assert sorted(row["request_id"] for row in request_reader.read(tmp_path).to_pylist()) == half[2:]


def test_a_journal_of_another_process_is_named_as_left(tmp_path: Path, store: Store) -> None:
    with RequestLog(tmp_path) as log:
        log_request(log, "a", "ada")
        done = erased(tmp_path, store, "user", "ada")
        assert any("1 requests in" in each for each in done.left)
    assert erased(tmp_path, store, "user", "ada").requests == 1
    assert request_reader.read(tmp_path).num_rows == 0


def test_files_from_before_the_columns_are_read_and_can_be_erased(tmp_path: Path, store: Store) -> None:
    with RequestLog(tmp_path) as log:
        log_request(log, "old", "ada")
        log_request(log, "older", "ada")
    [path] = segments.parquet_files(segments.folder_of(tmp_path))
    early = [name for name in COLUMNS if name not in list(COLUMNS)[list(COLUMNS).index("user") :]]
    pq.write_table(pq.read_table(path, columns=early), path)
    with RequestLog(tmp_path) as log:
        log_request(log, "new", "ada")
    told = {row["request_id"]: row["user"] for row in request_reader.read(tmp_path).to_pylist()}
    assert told == {"old": None, "older": None, "new": "ada"}
    assert erased(tmp_path, store, "request", "old").requests == 1
    assert isinstance(request_reader.read(tmp_path, limit=2), pa.Table)
    assert sorted(r["request_id"] for r in request_reader.read(tmp_path).to_pylist()) == ["new", "older"]


@pytest.mark.full
def test_sigkill_in_the_middle_loses_nobody_elses_rows(tmp_path: Path, store: Store) -> None:
    """Killed when a random number of the files has been rewritten."""
    generator, users, kept = random.Random(0), ("u0", "u1", "u2", "stays"), set()
    code = (
        "import sys; from pathlib import Path\n"
        "from workbench.observe.erase import Subject, erase; from workbench.settings import Settings\n"
        "from workbench.store import open_store\n"
        "home = Path(sys.argv[1])\n"
        "erase(Settings(home_dir=home), open_store(home), Subject('user', sys.argv[2]), with_mlflow=False)\n"
    )
    with RequestLog(tmp_path) as log:
        for part in range(40):
            for user in users:
                log_request(log, f"{user}-{part}x", user)
                kept |= {f"{user}-{part}x"} if user == "stays" else set()
            assert log.rotate()
        files = segments.parquet_files(log.folder)
    assert len(files) == 40
    num_cut = 0
    for user in users[:3]:
        before, wanted = [path.stat().st_ino for path in files], generator.randint(1, 30)
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), user],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )  # fmt: skip
        while process.poll() is None:
            if sum(path.stat().st_ino != inode for path, inode in zip(files, before, strict=True)) >= wanted:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        rows = request_reader.read(tmp_path).to_pylist()
        left = sum(row["user"] == user for row in rows)
        num_cut += process.returncode == -signal.SIGKILL and 0 < left < 40
        assert kept <= {row["request_id"] for row in rows}
        assert erased(tmp_path, store, "user", user).requests == left
    assert {row["request_id"] for row in request_reader.read(tmp_path).to_pylist()} == kept
    assert num_cut >= 1  # else no kill fell into the work, and nothing was tried
