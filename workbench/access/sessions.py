"""Sessions: who has logged in and until when, in the store; looked up in memory.

A session's id is 256 random bits in the browser's cookie. The table keeps its SHA-256 alone (an id of that entropy needs no slow
hash), so that who reads the database cannot act as anybody. The app's process is the table's one writer: it holds all live
sessions in memory, so that a lookup costs no query and a restart logs nobody out.

Boundary: ids and their owners. Whether the owner may still come in, and with which rights, is asked of others at each request.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from workbench.store import login_sessions

if TYPE_CHECKING:
    from workbench.store import Store

MAX_SESSIONS = 10_000  # in memory and in the table; the oldest go


@dataclass(frozen=True, slots=True)
class Session:
    """One login. `stamp`: of the password that it was opened with."""

    digest: str
    user: str
    stamp: str
    created_s: float  # Unix time, as `expires_s`
    expires_s: float


class Sessions:
    """The sessions of one store. Thread-safe. Those that begin and end write to the store: not for the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        with store.begin() as connection:
            connection.execute(sa.delete(login_sessions).where(login_sessions.c.expires_s < time.time()))
            rows = connection.execute(sa.select(login_sessions).order_by(login_sessions.c.created_s)).all()
        self._by_digest = {row.digest: Session(**row._mapping) for row in rows}

    def begin(self, user: str, stamp: str, seconds: float) -> str:
        """A new session's id, for the cookie. Raises StoreError."""
        made, now = secrets.token_urlsafe(32), time.time()
        session = Session(digest_of(made), user, stamp, now, now + seconds)
        with self._lock:
            gone = self._superfluous(now)
            with self._store.begin() as connection:
                for old in gone:
                    connection.execute(sa.delete(login_sessions).where(login_sessions.c.digest == old))
                connection.execute(sa.insert(login_sessions).values(asdict(session)))
            for old in gone:
                del self._by_digest[old]
            self._by_digest[session.digest] = session
        return made

    def get(self, session_id: str) -> Session | None:
        """The live session of that id. No query."""
        # By digest: how long a dictionary takes to find it tells nothing about the id.
        found = self._by_digest.get(digest_of(session_id))
        return found if found is not None and found.expires_s > time.time() else None

    def end(self, session_id: str) -> None:
        """Log out; nothing where there is no such session. Raises StoreError."""
        digest = digest_of(session_id)
        with self._lock:
            self._by_digest.pop(digest, None)  # first: out even if the disk is full
            with self._store.begin() as connection:
                connection.execute(sa.delete(login_sessions).where(login_sessions.c.digest == digest))

    def _superfluous(self, now: float) -> list[str]:
        live = [digest for digest, session in self._by_digest.items() if session.expires_s > now]
        ended = [digest for digest, session in self._by_digest.items() if session.expires_s <= now]
        return ended + live[: max(len(live) - MAX_SESSIONS + 1, 0)]


def digest_of(session_id: str) -> str:
    return hashlib.sha256(session_id.encode("utf-8", "surrogateescape")).hexdigest()
