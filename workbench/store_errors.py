"""What can go wrong with the store, as types, and which of them a database's complaint is.

    StoreError                    it cannot be read or written; nothing of the transaction was kept
    ├── StoreBusyError            others held it for too long: try again
    ├── StoreFullError            no space for more
    ├── StoreUnreachableError     the database server does not answer
    └── StoreValueError           a value that the database cannot hold

Boundary: types and texts. ``workbench.store`` raises them and has their names.
"""

from __future__ import annotations

import sqlalchemy as sa

from workbench import postgres
from workbench.errors import WorkbenchError

DATABASE_URL_VARIABLE = "QUIRE_DATABASE_URL"


class StoreError(WorkbenchError):
    """The store cannot be read or written; nothing of the transaction was kept."""

    code = "store_error"


class StoreBusyError(StoreError):
    """Another process held the write lock for too long."""

    code = "store_busy"


class StoreFullError(StoreError):
    """The disk or the quota of HOME_DIR is full."""

    code = "store_full"


class StoreUnreachableError(StoreError):
    """The database server does not answer, or went away: during a commit, only a look tells whether it was kept."""

    code = "store_unreachable"


class StoreValueError(StoreError, ValueError):
    """The database cannot hold this value, a NUL character in PostgreSQL's texts for one."""

    code = "store_value"


def of_file(where: str, reason: str, busy_timeout_ms: int) -> StoreError:
    """What SQLite, or the file system under it, complained of."""
    text = reason.lower()
    if "full" in text or "no space" in text or "quota" in text:
        return StoreFullError(
            f"the store {where} cannot grow: {reason}", value=where, param="HOME_DIR",
            remedy="Free space on that disk; what was stored before is intact.",
        )  # fmt: skip
    if "locked" in text or "busy" in text:
        return StoreBusyError(
            f"the store {where} was held by another process for {busy_timeout_ms / 1000:g} s", value=where,
            limit=busy_timeout_ms, param="HOME_DIR", remedy="Try again; if it stays so, end the process that holds it.",
        )  # fmt: skip
    return StoreError(
        f"the store {where} cannot be used: {reason}", value=where, param="HOME_DIR",
        remedy="Check that HOME_DIR can be written and that the file is a Quire database.",
    )  # fmt: skip


def of_server(where: str, error: sa.exc.DBAPIError) -> StoreError:
    """What a PostgreSQL server or its driver complained of."""
    kind, remedy = _OF_TROUBLE[postgres.trouble(error)]
    reason = " ".join(str(error.orig).split())
    return kind(
        f"the store {where} cannot be used: {reason}", value=where, param=DATABASE_URL_VARIABLE, remedy=remedy
    )


_OF_TROUBLE: dict[postgres.Trouble, tuple[type[StoreError], str]] = {
    "full": (StoreFullError, "Free space on the server's disk; what was stored before is intact."),
    "busy": (StoreBusyError, "Try again; if it stays so, look who holds it (pg_stat_activity)."),
    "unreachable": (StoreUnreachableError, f"Check the server and {DATABASE_URL_VARIABLE}, then try again."),
    "value": (StoreValueError, "Leave out what it names."),
    "other": (StoreError, "Check that the user may create tables and write there."),
}


def of_pool(where: str) -> StoreError:
    """No connection came free in SQLAlchemy's time."""
    return StoreBusyError(
        f"all connections of this process to the store {where} are in use", value=where, remedy="Try again."
    )


def of_address(url: str, error: Exception) -> StoreError:
    """Not an address of a database, or one whose driver is missing."""
    scheme = url.partition("://")[0] if "://" in url else ""  # the rest may hold a password
    missing = isinstance(error, ModuleNotFoundError)
    reason = str(error) if missing else "it is no address of a database"
    return StoreError(
        f"{DATABASE_URL_VARIABLE} ({scheme or 'no scheme'}) cannot be used: {reason}", value=scheme,
        limit="sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE", param=DATABASE_URL_VARIABLE,
        remedy="Run `pip install 'quire[postgres]'`." if missing else "Set it to such an address, or unset it.",
    )  # fmt: skip
