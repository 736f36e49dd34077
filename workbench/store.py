"""Store: the workbench's own tables (jobs, schedules, occurrences, feedback, keys, logins, audit log, endpoints) in ``HOME_DIR/quire.db``.

One SQLite file in WAL mode with a busy timeout, so that several processes write at once; ``QUIRE_DATABASE_URL`` names another
database: a PostgreSQL server, which several machines may share. A transaction is the unit of truth: what `begin` has left
without an error is on the disk, anything else never was.

Boundary: tables, transactions and their errors. What the rows mean is the room's that writes them; versions, runs and metrics
are MLflow's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.schema import CreateIndex, CreateTable

from workbench import postgres, store_errors
from workbench.postgres_url import with_driver
from workbench.store_errors import DATABASE_URL_VARIABLE
from workbench.store_errors import StoreBusyError as StoreBusyError  # its types belong to the store
from workbench.store_errors import StoreError as StoreError
from workbench.store_errors import StoreFullError as StoreFullError
from workbench.store_errors import StoreUnreachableError as StoreUnreachableError
from workbench.store_errors import StoreValueError as StoreValueError

UNREADABLE = "unreadable"  # the one field of what was stored and is no JSON any more
log = logging.getLogger(__name__)
_BUSY_TIMEOUT_MS = 10_000
_WRITE = "quire_write"

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("fraction", sa.Float, nullable=False, default=0.0),
    sa.Column("message", sa.Text, nullable=False, default=""),
    sa.Column("result", sa.JSON(none_as_null=True)),
    sa.Column("partial", sa.JSON(none_as_null=True)),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("device", sa.String(16), nullable=False),
    sa.Column("parent_id", sa.String(40)),  # the job that submitted this one
    sa.Column("created_at", sa.String(40), nullable=False),  # UTC, ISO 8601, as all times here
    sa.Column("started_at", sa.String(40)),
    sa.Column("ended_at", sa.String(40)),
    sa.Column("heartbeat_at", sa.String(40)),
    sa.Column("pid", sa.Integer),
    sa.Column("process", sa.Text),  # who runs it: a ProcessId's text, which no later process can have
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, default=False),
    sa.Column("log_path", sa.Text, nullable=False),
    sa.Index("jobs_by_state", "state", "created_at"),
)

schedules = sa.Table(
    "schedules",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("notebook", sa.Text, nullable=False),
    sa.Column("parameters", sa.JSON, nullable=False),
    sa.Column("trigger", sa.JSON, nullable=False),  # {"cron": …} | {"every_s": …} | {"at": …}
    sa.Column("timezone", sa.String(64), nullable=False),
    sa.Column("grace_s", sa.Float, nullable=False),
    sa.Column("enabled", sa.Boolean, nullable=False, default=True),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("next_due_at", sa.String(40)),  # NULL: it will not fire again
    sa.Index("schedules_by_due", "enabled", "next_due_at"),
)

schedule_occurrences = sa.Table(
    "schedule_occurrences",
    metadata,
    sa.Column("id", sa.String(80), primary_key=True),  # schedule id + due time: an occurrence exists once
    sa.Column("schedule_id", sa.String(40), nullable=False),  # kept when the schedule is removed
    sa.Column("schedule_name", sa.Text, nullable=False),
    sa.Column("due_at", sa.String(40), nullable=False),
    sa.Column("decided_at", sa.String(40), nullable=False),
    sa.Column("outcome", sa.String(16), nullable=False),  # fired | missed | overlap
    sa.Column(
        "coalesced", sa.Integer, nullable=False, default=0
    ),  # earlier due times that this one stands for
    sa.Column("job_id", sa.String(40)),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Index("occurrences_by_time", "decided_at"),
)

feedback_outbox = sa.Table(
    "feedback_outbox",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("value", sa.JSON(none_as_null=True)),
    sa.Column("comment", sa.Text),
    sa.Column("correction", sa.Text),
    sa.Column("user", sa.Text),
    sa.Column("sent_at", sa.String(40)),
    sa.Index("feedback_by_request", "request_id"),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(20), primary_key=True),  # a part of the key's text that is safe to show
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),  # of the whole text, which is kept nowhere
    sa.Column("rights", sa.JSON, nullable=False),
    sa.Column("limits", sa.JSON, nullable=False),  # those of KeyLimits that are set
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("created_by", sa.Text, nullable=False),
    sa.Column("expires_at", sa.String(40)),
    sa.Column("last_used_at", sa.String(40)),
    sa.Column("revoked_at", sa.String(40)),  # the row stays: the request log and the audit log name its id
)

api_key_usage = sa.Table(
    "api_key_usage",
    metadata,
    sa.Column("key_id", sa.String(20), primary_key=True),
    sa.Column("day", sa.String(10), primary_key=True),  # UTC, ISO 8601
    sa.Column("num_tokens", sa.BigInteger, nullable=False),
)

audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("principal", sa.Text, nullable=False),  # a Principal's id
    sa.Column("act", sa.String(40), nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("outcome", sa.String(80), nullable=False),  # "ok", or the code of the error
    sa.Column("detail", sa.Text, nullable=False, default=""),
)

login_sessions = sa.Table(
    "login_sessions",
    metadata,
    sa.Column(
        "digest", sa.String(64), primary_key=True
    ),  # SHA-256 of the id, which is nowhere but in the cookie
    sa.Column("user", sa.String(256), nullable=False),
    sa.Column("stamp", sa.String(32), nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("expires_s", sa.Float, nullable=False),
)


endpoints = sa.Table(
    "endpoints",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("key_env", sa.String(128)),  # the variable that holds its key; the key itself is never stored
    sa.Column("model", sa.Text),  # what is asked where nobody names one
    sa.Column("api_version", sa.String(32)),  # of Azure's addresses by deployment
    sa.Column("created_at", sa.String(40), nullable=False),
)


class Store:
    """One database. Thread-safe; each process opens its own. Close it, or use it as a context manager."""

    def __init__(self, url: str) -> None:
        """Connects when first used. Raises StoreError: no address of a database, or its driver is not installed."""
        url = with_driver(url)
        try:
            self.engine = sa.create_engine(
                url, json_serializer=_dumps, json_deserializer=_loads, **postgres.engine_options(url)
            )
        except (sa.exc.ArgumentError, ModuleNotFoundError) as error:
            raise store_errors.of_address(url, error) from None
        self.url = self.engine.url.render_as_string()  # without the password: errors and logs show it
        self._read_options: dict[str, Any] = {}
        if self.engine.dialect.name == "sqlite":
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)
        elif self.engine.dialect.name == "postgresql":
            postgres.prepare(self.engine, write_option=_WRITE, busy_timeout_ms=_BUSY_TIMEOUT_MS)
            self._read_options = {"isolation_level": "REPEATABLE READ"}

    def create_schema(self) -> None:
        """Make what is missing of the tables; several processes may do so at once. Raises StoreError."""
        with self.begin() as connection:
            for table in metadata.sorted_tables:
                connection.execute(CreateTable(table, if_not_exists=True))
                for index in sorted(table.indexes, key=lambda each: str(each.name)):
                    connection.execute(CreateIndex(index, if_not_exists=True))

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A write transaction: committed when the block ends, undone when it raises.

        Raises:
            StoreFullError, StoreBusyError, StoreError: nothing of the block was kept.
            StoreUnreachableError: likewise, unless the server went away during the commit itself.
            sqlalchemy.exc.IntegrityError: a row contradicts another; the caller knows what that means.
        """
        with self._typed_errors(), self.engine.connect() as connection:
            writing = connection.execution_options(**{_WRITE: True})
            with writing.begin():
                yield writing

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A consistent view that waits for no writer. Raises StoreError."""
        with self._typed_errors(), self.engine.connect() as connection:
            reading = connection.execution_options(**self._read_options)
            with reading.begin():
                yield reading

    def close(self) -> None:
        """Close the connections. A second call does nothing; a use after it opens new ones."""
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DBAPIError as error:
            denied = postgres.sqlstate(error) == postgres.DENIED
            if isinstance(error, sa.exc.IntegrityError | sa.exc.ProgrammingError) and not denied:
                raise
            if self.engine.dialect.name == "postgresql":
                raise store_errors.of_server(self.url, error) from error
            raise store_errors.of_file(self.url, str(error.orig), _BUSY_TIMEOUT_MS) from error
        except sa.exc.TimeoutError as error:
            raise store_errors.of_pool(self.url) from error
        except sqlite3.Error as error:  # of the pragmas, before SQLAlchemy has the connection
            raise store_errors.of_file(self.url, str(error), _BUSY_TIMEOUT_MS) from error


def open_store(home_dir: Path) -> Store:
    """The store of this HOME_DIR, its schema made. Raises StoreError."""
    url = os.environ.get(DATABASE_URL_VARIABLE)
    if not url:
        try:
            home_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise store_errors.of_file(str(home_dir), str(error), _BUSY_TIMEOUT_MS) from error
        url = f"sqlite:///{home_dir.absolute() / 'quire.db'}"
    store = Store(url)
    try:
        store.create_schema()
    except BaseException:
        store.close()
        raise
    return store


def utc_now() -> str:
    """Now as the store writes times: UTC, ISO 8601 with microseconds, so that text order is time order."""
    return utc_text(datetime.now(UTC))


def utc_text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def to_json(value: Any) -> Any:
    """`value` in JSON's own types: not-a-number and infinities become null, NumPy's scalars numbers, paths and enums text.

    Raises:
        StoreError: a value of a type that JSON has no form for.
    """
    if value is None or isinstance(value, bool | int | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item) for item in value]
    if isinstance(value, Path | Enum | datetime):
        return str(value.value if isinstance(value, Enum) else value)
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars
        return to_json(value.tolist())
    raise StoreError(
        f"a {type(value).__name__} cannot be stored as JSON", value=type(value).__name__,
        limit="numbers, texts, lists and objects",
    )  # fmt: skip


def _dumps(value: Any) -> str:
    return json.dumps(to_json(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _loads(text: str) -> Any:
    """A stored value. One that is no JSON becomes an object that says so: it must not hide the rows beside it."""
    try:
        return json.loads(text)
    except ValueError:
        log.warning("the store holds a value that is no JSON: %.100r", text)
        return {UNREADABLE: text[:1000]}


def _configure_sqlite(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say so
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA synchronous = FULL")  # an acknowledged row outlasts a power cut
    _use_wal(cursor)
    cursor.close()


def _use_wal(cursor: sqlite3.Cursor) -> None:
    """Switch to WAL once. The switch needs the file alone and does not heed the busy timeout."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    while cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get(_WRITE, False)
    # A reader that later writes could be refused for good; a writer says so at once and waits its turn.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
