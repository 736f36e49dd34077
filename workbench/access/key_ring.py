"""KeyRing: the keys of one running server, read from the store at most twice a second, and what they used, written every ten.

A request looks its key up in memory. Where what is there is older than a second, it waits for it to be read again, beside the event
loop: a key is in force, and out of force, within a second of the store's saying so. While the store cannot be read the keys of
the last time hold for a minute; then nobody gets in.

Boundary: which key a text is. What a key may do is decided in `workbench.api.auth` and `workbench.access.limits`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import sqlalchemy as sa

from workbench.access.keys import ApiKey, digest_of, id_in, key_of
from workbench.access.limits import KeyMeter
from workbench.errors import NotReadyError
from workbench.store import Store, StoreError, api_key_usage, api_keys, utc_text

log = logging.getLogger(__name__)
FRESH_S = 1.0  # how old what is known may be
_AHEAD_S = 0.5  # age at which it is read again without anybody waiting
_HOLDS_S = 60.0  # how long it counts while the store cannot be read
_SAVE_S = 10.0


class KeysUnavailableError(NotReadyError):
    """The keys cannot be read, so nobody can be let in."""

    code = "keys_unavailable"


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What the store said. `read_at`: monotonic, before it was read."""

    read_at: float = -_HOLDS_S
    keys: Mapping[str, tuple[ApiKey, str]] = field(default_factory=dict)  # by id, with their hashes


class KeyRing:
    """The keys of one store, with the meter of their use. Close it."""

    def __init__(self, store: Store) -> None:
        self.meter = KeyMeter()
        self._store = store
        self._known = _Snapshot()
        self._tried_at = -_HOLDS_S
        self._reading: asyncio.Task[None] | None = None
        self._io = (
            threading.Lock()
        )  # one at a time reads or writes, so that no use is counted twice or not at all
        self._stop = threading.Event()
        self._saver: threading.Thread | None = None

    def any_key(self) -> bool:
        """Whether a key was ever made: revoked and expired ones count, or the last one's end would open the door to all."""
        return bool(self._known.keys)

    def find(self, text: str) -> ApiKey | None:
        """The key of this text, valid or not; None where there is no such key."""
        found = self._known.keys.get(id_in(text) or "")
        if found is None or not hmac.compare_digest(found[1], digest_of(text)):
            return None
        return found[0]

    def needs_reading(self) -> bool:
        """Whether `read_again` must be awaited before what is known may be relied on. Starts reading ahead."""
        now = time.monotonic()
        age_s = now - max(self._known.read_at, self._tried_at)
        if _AHEAD_S < age_s < FRESH_S:
            self._start_reading()
        return age_s >= FRESH_S or now - self._known.read_at >= _HOLDS_S

    async def read_again(self) -> None:
        """Read the keys beside the event loop; all that ask meanwhile wait for the same. Raises KeysUnavailableError."""
        await asyncio.shield(self._start_reading())
        if time.monotonic() - self._known.read_at >= _HOLDS_S:
            raise KeysUnavailableError(
                "the API keys cannot be read, so nobody is let in", param="QUIRE_DATABASE_URL",
                remedy="Try again in some seconds; the server's log has the cause.",
            )  # fmt: skip

    def refresh(self) -> None:
        """Read keys and today's use. Raises StoreError."""
        with self._io:
            self._tried_at = began = time.monotonic()
            day = datetime.now(UTC).date().isoformat()
            with self._store.read() as connection:
                rows = connection.execute(sa.select(api_keys)).mappings().all()
                query = sa.select(api_key_usage.c.key_id, api_key_usage.c.num_tokens)
                used = connection.execute(query.where(api_key_usage.c.day == day)).all() if rows else []
            self.meter.know(day, {row.key_id: row.num_tokens for row in used})
            self._known = _Snapshot(began, {row["id"]: (key_of(row), row["sha256"]) for row in rows})
            if rows and self._saver is None and not self._stop.is_set():
                self._saver = threading.Thread(target=self._save_often, name="quire-key-usage", daemon=True)
                self._saver.start()

    def save(self) -> None:
        """Write down what was used since the last time. Raises StoreError: it is kept for the next time."""
        with self._io:
            tokens, used_at = self.meter.unsaved()
            if not tokens and not used_at:
                return
            with self._store.begin() as connection:
                for (key_id, day), count in tokens.items():
                    _add(connection, key_id, day, count)
                for key_id, moment in used_at.items():
                    change = api_keys.update().where(api_keys.c.id == key_id)
                    connection.execute(change.values(last_used_at=utc_text(moment)))
            self.meter.saved(tokens, used_at)

    def close(self) -> None:
        """Write what was used, for the last time."""
        self._stop.set()
        if self._saver is not None:
            self._saver.join()
        self._save_or_tell()

    def _start_reading(self) -> asyncio.Task[None]:
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(asyncio.to_thread(self._refresh_or_tell))
        return self._reading

    def _refresh_or_tell(self) -> None:
        try:
            self.refresh()
        except StoreError as error:
            log.error("the API keys cannot be read: %s", error)

    def _save_often(self) -> None:
        while not self._stop.wait(_SAVE_S):
            self._save_or_tell()

    def _save_or_tell(self) -> None:
        try:
            self.save()
        except (StoreError, sa.exc.IntegrityError) as error:  # another server made the day's row meanwhile
            log.error("what the API keys used cannot be written: %s", error)


def _add(connection: sa.Connection, key_id: str, day: str, count: int) -> None:
    """Add to a key's day, which other servers add to as well."""
    own = (api_key_usage.c.key_id == key_id) & (api_key_usage.c.day == day)
    change = api_key_usage.update().where(own).values(num_tokens=api_key_usage.c.num_tokens + count)
    if connection.execute(change).rowcount == 0:
        connection.execute(api_key_usage.insert().values(key_id=key_id, day=day, num_tokens=count))
