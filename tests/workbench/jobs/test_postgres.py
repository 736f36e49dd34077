"""The store on a real PostgreSQL server: writers in turn, one snapshot a reader, a server that goes away, typed errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from workbench.jobs import Jobs
from workbench.jobs.process_id import ProcessId
from workbench.store import (
    Store,
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreUnreachableError,
    StoreValueError,
    feedback_outbox,
    open_store,
    utc_now,
)

if TYPE_CHECKING:
    from postgres_server import PostgresServer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def store(postgres_url: str, home: Path) -> Iterator[Store]:
    with open_store(home) as opened:
        yield opened


def add(store: Store, request_id: str, **values: object) -> None:
    row = {"request_id": request_id, "created_at": utc_now(), "kind": "comment", **values}
    with store.begin() as connection:
        connection.execute(feedback_outbox.insert().values(row))


def request_ids(connection: sa.Connection) -> list[str]:
    query = sa.select(feedback_outbox.c.request_id).order_by(feedback_outbox.c.id)
    return list(connection.execute(query).scalars())


def at_once(acts: list[Callable[[], None]]) -> None:
    """Run all in threads; the first error is raised here."""
    errors: list[BaseException] = []
    gate = threading.Barrier(len(acts))

    def run(act: Callable[[], None]) -> None:
        try:
            gate.wait(10)
            act()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]


def test_schema_rows_and_claims_by_four_at_once(postgres_url: str, home: Path) -> None:
    """CREATE TABLE IF NOT EXISTS alone fails when two do it at once; a claim is one process's."""
    stores = [Store(postgres_url) for _ in range(4)]
    try:
        at_once([store.create_schema for store in stores])
        jobs = [Jobs(store, home) for store in stores]
        ids = [jobs[0].submit("probe", {}, device="none").id for _ in range(12)]
        taken: list[str] = []

        def claim(own: Jobs) -> None:
            owner = ProcessId.of(os.getpid())
            taken.extend(job_id for job_id in ids if own.claims.claim(job_id, owner))

        at_once([lambda own=own: claim(own) for own in jobs])
        assert sorted(taken) == sorted(ids)
        assert {job.attempts for job in jobs[0].list()} == {1}
    finally:
        for store in stores:
            store.close()


CLAIMER = """
import os, sys
from pathlib import Path
from workbench.jobs import Jobs
from workbench.jobs.process_id import ProcessId
from workbench.store import open_store
with open_store(Path(sys.argv[1])) as store:
    jobs, owner = Jobs(store, Path(sys.argv[1])), ProcessId.of(os.getpid())
    print("ready", flush=True)
    input()
    for job in reversed(jobs.claims.open_jobs()) if sys.argv[2] == "1" else jobs.claims.open_jobs():
        if jobs.claims.claim(job.id, owner):
            print(job.id)
"""


@pytest.mark.full
@pytest.mark.usefixtures("postgres_url")
def test_two_processes_claim_each_job_once(jobs: Jobs, home: Path) -> None:
    ids = [jobs.submit("probe", {}, device="none").id for _ in range(100)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, str(home), str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for number in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    taken = [job_id for process in processes for job_id in process.communicate(timeout=60)[0].split()]
    assert sorted(taken) == sorted(ids)


def test_a_reader_sees_one_moment_and_waits_for_nobody(store: Store) -> None:
    add(store, "before")
    with store.read() as reading:
        assert request_ids(reading) == ["before"]
        with store.begin() as writing:
            writing.execute(
                feedback_outbox.insert().values(request_id="r", created_at=utc_now(), kind="comment")
            )
            assert request_ids(reading) == ["before"]
        assert request_ids(reading) == ["before"]
    with store.read() as reading:
        assert request_ids(reading) == ["before", "r"]


def test_a_server_that_crashed_is_a_typed_error_until_it_is_back(
    store: Store, postgres_server: PostgresServer
) -> None:
    add(store, "acknowledged")
    with pytest.raises(StoreUnreachableError), store.begin() as connection:
        connection.execute(
            feedback_outbox.insert().values(request_id="cut", created_at=utc_now(), kind="comment")
        )
        postgres_server.stop(signal.SIGQUIT)
        try:
            request_ids(connection)
        finally:
            with pytest.raises(StoreUnreachableError) as down, store.read():
                pass
            postgres_server.start()
    assert down.value.remedy
    add(store, "after")  # by connections that the server no longer knows
    with store.read() as connection:
        assert request_ids(connection) == ["acknowledged", "after"]


def test_a_writer_that_is_held_up_says_so(store: Store) -> None:
    with Store(str(os.environ["QUIRE_DATABASE_URL"])) as other, store.begin():

        def hurry(connection: object, record: object) -> None:
            connection.execute("SET lock_timeout = 50")  # type: ignore[attr-defined]
            connection.commit()  # type: ignore[attr-defined]

        sa.event.listen(other.engine, "connect", hurry)  # behind the ten seconds that the store sets
        with pytest.raises(StoreBusyError, match="lock timeout"):
            add(other, "late")


@pytest.mark.parametrize(
    ("sqlstate", "error"),
    [
        ("53100", StoreFullError),
        ("40P01", StoreBusyError),
        ("57P01", StoreUnreachableError),
        ("42501", StoreError),
    ],
)
def test_what_the_server_says_becomes_a_type(store: Store, sqlstate: str, error: type[StoreError]) -> None:
    with pytest.raises(error) as caught, store.begin() as connection:
        connection.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{sqlstate}'; END $$")
    assert type(caught.value) is error
    assert caught.value.remedy


def test_a_text_that_the_database_cannot_hold_is_refused_whole(store: Store) -> None:
    with pytest.raises(StoreValueError, match="NUL"):
        add(store, "r", comment="a\0b")
    add(store, "json", value={"text": "a\0b"})  # JSON has a way to write it
    with store.read() as connection:
        assert connection.execute(sa.select(feedback_outbox.c.value)).scalars().all() == [{"text": "a\0b"}]


def test_an_address_that_leads_nowhere_is_told_without_its_password(tmp_path: Path) -> None:
    with Store(f"postgresql://quire:secret-word@/nothing?host={tmp_path}") as store:
        assert store.engine.dialect.driver == "psycopg"
        with pytest.raises(StoreUnreachableError) as unreachable, store.read():
            pass
    with pytest.raises(StoreError) as unknown:
        Store("oracle+nothing://quire:secret-word@host/database")
    assert "secret-word" not in str(unreachable.value) + str(unknown.value) + store.url
