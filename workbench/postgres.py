"""PostgreSQL under the store: how its transactions keep what SQLite's do, and what its errors mean.

The store's promise is one writer at a time and readers that wait for nobody. Writers therefore take one advisory lock first,
in READ COMMITTED: whatever they read afterwards is the newest. Readers see one snapshot (REPEATABLE READ). The lock is given
back after the commit can be seen, so that no retry is needed; what the store writes is small and rare.

Boundary: connections and codes. Types of errors are ``workbench.store``'s. The driver is psycopg 3 (``quire[postgres]``).
"""

from __future__ import annotations

from typing import Any, Literal

import sqlalchemy as sa

Trouble = Literal["full", "busy", "unreachable", "value", "other"]

_CONNECT_TIMEOUT_S = 10
_IDLE_TIMEOUT_MS = 60_000  # of a writer whose machine is gone: its lock must not outlive it for long
_LOCK_KEY = 0x5175697265  # "Quire": one lock a database

# PostgreSQL's SQLSTATE codes. Source: its manual, appendix "PostgreSQL Error Codes".
_FULL = ("53100",)  # disk_full
_BUSY = ("55P03", "40P01", "40001", "57014", "53300")  # lock, deadlock, serialization, cancelled, connections
_UNREACHABLE = ("08", "57P", "25P03")  # connection exceptions, shutdown and start-up, idle in a transaction
_VALUE = ("22",)  # data exceptions
DENIED = "42501"  # insufficient_privilege


def engine_options(url: str) -> dict[str, Any]:
    """What `sqlalchemy.create_engine` needs besides the address; nothing for other databases.

    A connection is tried before it is used, so that a server that was restarted costs no transaction.
    """
    if not url.startswith("postgresql"):
        return {}
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_TIMEOUT_S}}


def prepare(engine: sa.Engine, *, write_option: str, busy_timeout_ms: int) -> None:
    """Have each write transaction of `engine` wait for its turn; one with the execution option `write_option` writes."""

    def configure(connection: Any, record: object) -> None:
        connection.autocommit = True  # or the settings would be gone with the first rollback
        connection.execute(f"SET lock_timeout = {busy_timeout_ms}")
        connection.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_TIMEOUT_MS}")
        connection.autocommit = False

    def begin(connection: sa.Connection) -> None:
        if connection.get_execution_options().get(write_option, False):
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK_KEY})")

    sa.event.listen(engine, "connect", configure)
    sa.event.listen(engine, "begin", begin)


def sqlstate(error: sa.exc.DBAPIError) -> str:
    """The server's code of an error; empty where it had no say."""
    return str(getattr(error.orig, "sqlstate", None) or "")


def trouble(error: sa.exc.DBAPIError) -> Trouble:
    """What an error of the driver means for the caller."""
    code = sqlstate(error)
    if code.startswith(_FULL):
        return "full"
    if code.startswith(_BUSY):
        return "busy"
    if code.startswith(_VALUE) or isinstance(error, sa.exc.DataError):
        return "value"
    # Without a code it was not the server who spoke: no connection, or one that broke.
    if code.startswith(_UNREACHABLE) or (not code and isinstance(error, sa.exc.OperationalError)):
        return "unreachable"
    return "other"
