"""API keys: made, listed and revoked; who has one may ask what its rights allow, as much as its limits allow.

A key's text is ``sk-quire-ID-SECRET``. It is shown once, when it is made; the store has its hash. ``key-ID`` names it everywhere
else: in lists, logs and the request log.

Boundary: rows. Which key a request brings is `workbench.access.key_ring`'s, how much it may still ask for `workbench.access.limits`'.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from workbench.access import audit
from workbench.access.acting import acting
from workbench.access.principal import Principal, Right
from workbench.errors import WorkbenchError
from workbench.store import Store, api_keys, utc_text

TEXT_PREFIX = "sk-quire-"  # as secret scanners and our own redaction know keys by
ID_PREFIX = "key-"
_ID_HEX, _SECRET_BYTES = 10, 32
_TEXT = re.compile(rf"{TEXT_PREFIX}([0-9a-f]{{{_ID_HEX}}})-[0-9a-f]{{{2 * _SECRET_BYTES}}}")
_MAX_NAME = 100
_MAX_DAYS = 36_500


class KeySettingsError(WorkbenchError, ValueError):
    """A key cannot be made like that."""

    code = "invalid_key_settings"


class UnknownKeyError(WorkbenchError, LookupError):
    """There is no key of that id."""

    code = "unknown_key"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may ask for; None: as much as the server gives."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and output
    max_concurrent: int | None = None  # requests
    daily_tokens: int | None = None  # prompt and output, of a day in UTC

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return self != _UNLIMITED  # asked for every request: `as_dict` would take longer than all else there

    def as_dict(self) -> dict[str, int]:
        """Those that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_UNLIMITED = KeyLimits()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key as it is on the list. Times: UTC, ISO 8601."""

    id: str
    name: str
    principal: Principal
    limits: KeyLimits
    created_at: str
    created_by: str
    expires_at: str | None
    last_used_at: str | None
    revoked_at: str | None

    def is_valid(self, now: str) -> bool:
        """Whether it opens anything at `now` (as the store writes times)."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    @property
    def rights(self) -> list[str]:
        return sorted(right.value for right in self.principal.rights)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made, with the only copy of its text."""

    key: ApiKey
    text: str

    def __repr__(self) -> str:
        return f"NewKey({self.key.id})"


def create(
    store: Store,
    name: str,
    rights: Iterable[Right],
    limits: KeyLimits | None = None,
    *,
    expires_days: int | None = None,
) -> NewKey:
    """Make a key. It is in force at once.

    Raises:
        KeySettingsError: no name, no right, a limit below 1.
        StoreError: it could not be stored.
    """
    name, given, limits = name.strip(), frozenset(rights), limits or KeyLimits()
    _check(name, given, limits, expires_days)
    number = secrets.token_hex(_ID_HEX // 2)
    text = f"{TEXT_PREFIX}{number}-{secrets.token_hex(_SECRET_BYTES)}"
    now = datetime.now(UTC)
    row: dict[str, Any] = {
        "id": ID_PREFIX + number, "name": name, "sha256": digest_of(text), "rights": sorted(given),
        "limits": limits.as_dict(), "created_at": utc_text(now), "created_by": acting().id,
        "expires_at": utc_text(now + timedelta(days=expires_days)) if expires_days else None,
        "last_used_at": None, "revoked_at": None,
    }  # fmt: skip
    with store.begin() as connection:
        connection.execute(api_keys.insert().values(row))
        audit.write(connection, "make key", row["id"], detail=f"{name}: {', '.join(row['rights'])}")
    return NewKey(key_of(row), text)


def listed(store: Store) -> list[ApiKey]:
    """All keys, also those that are revoked, newest first. Raises StoreError."""
    with store.read() as connection:
        rows = connection.execute(sa.select(api_keys).order_by(api_keys.c.created_at.desc())).mappings()
        return [key_of(row) for row in rows]


def revoke(store: Store, key_id: str) -> ApiKey:
    """Have a key open nothing any more: here at once, in a running app within a second. Requests that run may end.

    Raises:
        UnknownKeyError
        StoreError: it is in force still.
    """
    with store.begin() as connection:
        found = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).mappings().first()
        if found is None:
            # The text may be a whole key, pasted by mistake: nothing of it is told.
            raise UnknownKeyError(
                "there is no key of that id", limit=f"{ID_PREFIX}…, as `quire keys list` shows it", param="id",
                remedy="`quire keys list` names those that exist.",
            )  # fmt: skip
        row = dict(found)
        if row["revoked_at"] is None:
            row["revoked_at"] = utc_text(datetime.now(UTC))
            change = api_keys.update().where(api_keys.c.id == key_id)
            connection.execute(change.values(revoked_at=row["revoked_at"]))
            audit.write(connection, "revoke key", key_id, detail=row["name"])
    return key_of(row)


def id_in(text: str) -> str | None:
    """The id that a key's text names; None where it has no key's form."""
    found = _TEXT.fullmatch(text)
    return ID_PREFIX + found[1] if found else None


def digest_of(text: str) -> str:
    """What the store keeps of a key."""
    # A slow hash protects what can be guessed. 256 random bits cannot, and this runs for every request.
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(row: Any) -> ApiKey:
    """A row of the table, its hash left out."""
    return ApiKey(
        row["id"], row["name"], Principal(row["id"], frozenset(map(Right, row["rights"]))),
        KeyLimits(**row["limits"]), row["created_at"], row["created_by"], row["expires_at"], row["last_used_at"],
        row["revoked_at"],
    )  # fmt: skip


def _check(name: str, rights: frozenset[Right], limits: KeyLimits, expires_days: int | None) -> None:
    if not 1 <= len(name) <= _MAX_NAME or not name.isprintable():
        raise KeySettingsError(
            f"a key's name has 1 to {_MAX_NAME} printable characters", limit=_MAX_NAME, param="name",
            remedy="Name who or what will use it.",
        )  # fmt: skip
    if not rights:
        raise KeySettingsError(
            "a key without a right opens nothing", limit=[right.value for right in Right], param="right",
            remedy="Give at least one of infer, read and admin.",
        )  # fmt: skip
    for field in fields(limits):
        value = getattr(limits, field.name)
        if value is not None and value < 1:
            raise KeySettingsError(
                f"{field.name} must be at least 1, got {value}", value=value, limit=1, param=field.name,
                remedy="Leave it out for no limit.",
            )  # fmt: skip
    if expires_days is not None and not 1 <= expires_days <= _MAX_DAYS:
        raise KeySettingsError(
            f"a key lives for 1 to {_MAX_DAYS} days, got {expires_days}", value=expires_days, limit=_MAX_DAYS,
            param="expires_days", remedy="Leave it out for a key without an end.",
        )  # fmt: skip
