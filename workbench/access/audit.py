"""The audit log: who changed what this server does, when, and with what outcome. Rows are added, never changed or removed.

Keys, jobs and schedules write their row in the transaction of the act itself, so that neither is there without the other.
What acts on engines and on the registry is written when it has ended, well or not; where that cannot be written, the server's log
says so and the act stands.

Boundary: rows. What counts as an act is decided where it happens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import sqlalchemy as sa

from workbench.access.acting import acting
from workbench.errors import WorkbenchError
from workbench.store import Store, audit_log, open_store, utc_now

log = logging.getLogger(__name__)
OK = "ok"
_MAX_TEXT = 500
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One act. `at`: UTC, ISO 8601. `outcome`: "ok", or the code of the error that ended it."""

    at: str
    principal: str
    act: str
    target: str
    outcome: str
    detail: str


def write(connection: sa.Connection, act: str, target: str, *, outcome: str = OK, detail: str = "") -> None:
    """Add a row in the caller's transaction."""
    row = {
        "at": utc_now(), "principal": acting().id, "act": act, "target": target[:_MAX_TEXT], "outcome": outcome,
        "detail": detail[:_MAX_TEXT],
    }  # fmt: skip
    connection.execute(audit_log.insert().values(row))


def latest(store: Store, limit: int = 50) -> list[Entry]:
    """The last acts, newest first. Raises StoreError."""
    columns = [audit_log.c[name] for name in Entry.__slots__]
    with store.read() as connection:
        rows = connection.execute(sa.select(*columns).order_by(audit_log.c.id.desc()).limit(limit))
        return [Entry(*row) for row in rows]


class Audit:
    """The log of one app process. Without a store, which it gets when the app opens one, it writes nothing."""

    def __init__(self) -> None:
        self.store: Store | None = None

    @contextmanager
    def of(self, act: str, target: str, detail: str = "") -> Iterator[None]:
        """Write `act` down when the block has ended, well or not."""
        outcome = "error"
        try:
            yield
            outcome = OK
        except BaseException as error:
            outcome = str(getattr(error, "code", type(error).__name__))
            raise
        finally:
            self._write(act, target, outcome, detail)

    def _write(self, act: str, target: str, outcome: str, detail: str) -> None:
        if self.store is None:
            return
        try:
            with self.store.begin() as connection:
                write(connection, act, target, outcome=outcome, detail=detail)
        except WorkbenchError as error:
            log.error("not on the audit log: %s %s by %s: %s: %s", act, target, acting().id, outcome, error)


class HasAudit(Protocol):
    audit: Audit


S = TypeVar("S", bound=HasAudit)


def audited(act: str) -> Callable[
    [Callable[Concatenate[S, str, P], T]], Callable[Concatenate[S, str, P], T]
]:  # fmt: skip
    """Of a method whose first argument names what it acts on: each call is an act, written to ``self.audit``."""

    def wrap(method: Callable[Concatenate[S, str, P], T]) -> Callable[Concatenate[S, str, P], T]:
        @wraps(method)
        def call(self: S, target: str, /, *args: P.args, **more: P.kwargs) -> T:
            with self.audit.of(act, target):
                return method(self, target, *args, **more)

        return call

    return wrap


@contextmanager
def audited_in(home_dir: Path, act: str, target: str, detail: str = "") -> Iterator[None]:
    """As `Audit.of`, for services that have no store at hand."""
    audit = Audit()
    try:
        audit.store = open_store(home_dir)
    except WorkbenchError as error:
        log.error("the audit log cannot be opened: %s", error)
    try:
        with audit.of(act, target, detail):
            yield
    finally:
        if audit.store is not None:
            audit.store.close()
