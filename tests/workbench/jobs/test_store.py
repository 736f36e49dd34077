"""The store: many writers at once, killed writers, a full disk, a file that is no database."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from workbench.api.errors import error_response
from workbench.jobs import Jobs, JobState
from workbench.store import (
    Store,
    StoreBusyError,
    StoreError,
    StoreFullError,
    feedback_outbox,
    jobs,
    open_store,
    to_json,
    utc_now,
)

ROOT = Path(__file__).resolve().parents[3]
WRITER = """
import sys
from pathlib import Path
from workbench.store import feedback_outbox, open_store, utc_now
home, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with open_store(home) as store:
    for i in range(count):
        with store.begin() as connection:
            connection.execute(feedback_outbox.insert().values(
                request_id=f"{name}-{i}", created_at=utc_now(), kind="score", value=i))
        print(i, flush=True)
"""


def write(home: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(home), name, str(count)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def request_ids(store: Store) -> list[str]:
    with store.read() as connection:
        return list(connection.execute(sa.select(feedback_outbox.c.request_id)).scalars())


@pytest.mark.full
def test_four_processes_with_a_thousand_rows_each_lose_none(home: Path) -> None:
    writers = [write(home, f"w{i}", 1000) for i in range(4)]  # all make the schema at once, too
    for writer in writers:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    with open_store(home) as store:
        found = request_ids(store)
    assert len(found) == 4000
    assert set(found) == {f"w{i}-{j}" for i in range(4) for j in range(1000)}


@pytest.mark.usefixtures("database")
def test_what_a_killed_writer_had_acknowledged_is_there(home: Path) -> None:
    writer = write(home, "w", 100_000)
    assert writer.stdout is not None
    for line in writer.stdout:
        if line == "150\n":
            break
    writer.send_signal(signal.SIGKILL)
    told = [150] + [int(line) for line in writer.communicate()[0].split()]  # a row is told after its commit
    with open_store(home) as store:
        found = set(request_ids(store))
    assert found >= {f"w-{i}" for i in range(max(told) + 1)}
    assert len(found) <= max(told) + 2, "at most one row was committed and not told yet"


@pytest.mark.usefixtures("database")
def test_a_block_that_raises_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError, match="after the insert"), store.begin() as connection:
        row = {"request_id": "r", "created_at": utc_now(), "kind": "comment"}
        connection.execute(feedback_outbox.insert().values(row))
        raise RuntimeError("after the insert")
    assert request_ids(store) == []


def test_a_full_disk_is_a_typed_error_and_keeps_what_there_was(store: Store, fault: Any) -> None:
    row = {"created_at": utc_now(), "kind": "comment", "comment": "x" * 4000}
    with store.begin() as connection:
        connection.execute(feedback_outbox.insert().values(request_id="before", **row))

    def limit_pages(connection: sqlite3.Connection, record: object) -> None:
        used = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {used + 4}")  # SQLite answers as on a full disk

    sa.event.listen(store.engine, "connect", limit_pages)
    store.engine.dispose()
    with pytest.raises(StoreFullError) as caught, store.begin() as connection:
        for i in range(100):
            connection.execute(feedback_outbox.insert().values(request_id=f"r{i}", **row))
    assert caught.value.remedy
    assert request_ids(store) == ["before"]
    answer = error_response(caught.value)
    fault(
        "the disk is full: store", fails=f"what writes jobs, schedules or feedback: {answer.status_code} `{caught.value.code}`; a "
        "running job that cannot store what it found fails with the same code", goes_on="answers, and all that reads the store",
        afterwards="what was stored before, nothing of what was refused",
    )  # fmt: skip


def test_a_file_that_is_no_database_is_a_typed_error(home: Path, fault: Any) -> None:
    home.mkdir()
    (home / "quire.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="not a database") as caught:
        open_store(home)
    assert (home / "quire.db").read_bytes() == b"not a database" * 100
    fault(
        "the store's file is none", fails=f"the app does not start: `{caught.value.code}`, naming the file",
        goes_on="nothing", afterwards="the file as it was; another can be put in its place",
    )  # fmt: skip


def test_a_lock_that_another_process_holds_is_waited_for_and_then_told(store: Store, fault: Any) -> None:
    sa.event.listen(
        store.engine, "connect", lambda each, _: each.execute("PRAGMA busy_timeout = 200"), insert=False
    )
    store.engine.dispose()
    other = sqlite3.connect(store.url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    row = {"created_at": utc_now(), "kind": "thumbs"}
    with pytest.raises(StoreBusyError) as caught, store.begin() as connection:
        connection.execute(feedback_outbox.insert().values(request_id="refused", **row))
    assert request_ids(store) == [], "readers go on"
    answer = error_response(caught.value)
    other.execute("ROLLBACK")
    other.close()
    with store.begin() as connection:
        connection.execute(feedback_outbox.insert().values(request_id="later", **row))
    assert request_ids(store) == ["later"]
    fault(
        "another process holds the store's write lock",
        fails=f"what writes jobs, schedules or feedback, after 10 s: {answer.status_code} `{caught.value.code}`, with "
        f"Retry-After {answer.headers['retry-after']}", goes_on="answers, the request log, and all that reads the store",
        afterwards="nothing of what was refused; writing succeeds when the lock is free",
    )  # fmt: skip


def test_a_value_that_is_no_json_hides_no_other_row(store: Store, home: Path, fault: Any) -> None:
    table = Jobs(store, home)
    whole, broken = table.submit("probe", {"steps": 1}), table.submit("probe", {"steps": 1})
    with store.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET spec = '{\"steps\": 1' WHERE id = ?", (broken.id,))
    assert {each.id for each in table.list()} == {whole.id, broken.id}
    ended = table.run_here(broken.id)
    assert (ended.state, table.run_here(whole.id).state) == (JobState.FAILED, JobState.DONE)
    assert ended.error is not None
    fault(
        "a job's row holds garbage", fails=f"that job, `{ended.state.value}` with `{ended.error['code']}`", goes_on="all other jobs",
        afterwards="both are listed; a warning names what is no JSON",
    )  # fmt: skip


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        open_store(tmp_path / "file" / "home")


def test_another_database_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_DATABASE_URL", f"sqlite:///{tmp_path / 'elsewhere.db'}")
    with open_store(tmp_path / "home") as store, store.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(jobs)).scalar() == 0
    assert (tmp_path / "elsewhere.db").is_file()
    assert not (tmp_path / "home" / "quire.db").exists()


@pytest.mark.usefixtures("database")
def test_readers_do_not_wait_for_a_writer(store: Store) -> None:
    with store.begin() as writing:
        writing.execute(feedback_outbox.insert().values(request_id="r", created_at=utc_now(), kind="thumbs"))
        assert request_ids(store) == []  # at once, and without what is not committed
    assert request_ids(store) == ["r"]


def test_json_has_no_nan_and_knows_numpy_and_paths() -> None:
    import numpy as np

    assert to_json({"a": float("nan"), "b": np.float32(1.5), "c": np.arange(2), "d": Path("/x"), 1: (True, None)}) == {
        "a": None, "b": 1.5, "c": [0, 1], "d": "/x", "1": [True, None],
    }  # fmt: skip
    with pytest.raises(StoreError, match="object"):
        to_json({"a": object()})
