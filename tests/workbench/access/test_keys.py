"""API keys: made once, kept as hashes, found by a running server within a second, gone within a second."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from workbench.access import audit, keys
from workbench.access.acting import acting_as
from workbench.access.key_ring import KeyRing, KeysUnavailableError
from workbench.access.keys import KeyLimits, KeySettingsError, UnknownKeyError
from workbench.access.principal import Principal, Right
from workbench.store import Store, api_keys, open_store, utc_text

ANN = Principal("ann", frozenset({Right.ADMIN}))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_a_key_is_shown_once_and_stored_as_a_hash(store: Store, home: Path) -> None:
    with acting_as(ANN):
        made = keys.create(
            store, " ci ", [Right.READ, Right.INFER], KeyLimits(daily_tokens=9), expires_days=2
        )
    [key] = keys.listed(store)
    assert key == made.key
    assert (key.name, key.rights, key.limits.as_dict(), key.created_by) == (
        "ci", ["infer", "read"], {"daily_tokens": 9}, "ann",
    )  # fmt: skip
    assert key.id.removeprefix(keys.ID_PREFIX) in made.text, "the id can be read off the key"
    assert made.text not in repr(made)
    secret = made.text.rpartition("-")[2]
    assert len(secret) == 64
    store.close()  # writes the WAL back
    for file in home.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file
    assert audit.latest(store)[0].detail == "ci: infer, read"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"name": " "}, "name"), ({"name": "a\nb"}, "name"), ({"rights": []}, "right"),
        ({"limits": KeyLimits(tokens_per_minute=0)}, "tokens_per_minute"), ({"expires_days": 0}, "expires_days"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_key_is_refused_by_name(store: Store, change: dict[str, object], param: str) -> None:
    with pytest.raises(KeySettingsError) as caught:
        keys.create(store, **{"name": "x", "rights": [Right.INFER], **change})  # type: ignore[arg-type]
    assert caught.value.param == param
    assert keys.listed(store) == []


def test_only_the_whole_text_is_the_key(store: Store) -> None:
    made, other = (keys.create(store, name, [Right.INFER]) for name in "ab")
    ring = KeyRing(store)
    ring.refresh()
    assert ring.find(made.text) == made.key
    mixed = made.text.rpartition("-")[0] + "-" + other.text.rpartition("-")[2]
    for text in (
        "",
        made.text[:-1],
        made.text + "0",
        made.text.upper(),
        mixed,
        made.key.id,
        "Bearer",
        "é" * 90,
    ):
        assert ring.find(text) is None, text
    ring.close()


def test_a_revoked_or_expired_key_still_closes_the_door(store: Store) -> None:
    made = keys.create(store, "a", [Right.INFER], expires_days=1)
    day_after = utc_text(datetime.now(UTC) + timedelta(days=1, seconds=1))
    assert made.key.is_valid(utc_text(datetime.now(UTC)))
    assert not made.key.is_valid(day_after)
    revoked = keys.revoke(store, made.key.id)
    assert not revoked.is_valid(made.key.created_at)
    assert keys.revoke(store, made.key.id) == revoked, "a second time changes nothing"
    assert [entry.act for entry in audit.latest(store)] == ["revoke key", "make key"]
    ring = KeyRing(store)
    ring.refresh()
    assert ring.any_key()
    ring.close()


def test_an_unknown_id_is_not_repeated_for_it_may_be_a_key(store: Store) -> None:
    text = keys.create(store, "a", [Right.INFER]).text
    with pytest.raises(UnknownKeyError) as caught:
        keys.revoke(store, text)
    assert text not in str(caught.value) + repr(caught.value.__dict__)


def test_a_running_server_learns_of_keys_within_a_second_and_does_not_read_at_each_request(
    store: Store,
) -> None:
    reads = 0

    def count(*_: object) -> None:
        nonlocal reads
        reads += 1

    ring = KeyRing(store)
    sa.event.listen(store.engine, "begin", count)

    async def serve() -> None:
        nonlocal reads
        assert ring.needs_reading(), "nothing is known yet"
        await asyncio.gather(*(ring.read_again() for _ in range(20)))
        assert (reads, ring.any_key()) == (1, False), "all wait for the same reading"
        made = keys.create(store, "a", [Right.INFER])
        reads = 0
        for _ in range(1000):
            assert not ring.needs_reading() or time.monotonic() - ring._known.read_at > 0.5
        assert reads == 0
        await asyncio.sleep(1.0 - (time.monotonic() - ring._known.read_at))
        assert ring.needs_reading()
        await ring.read_again()
        assert ring.find(made.text) == made.key

    try:
        asyncio.run(serve())
    finally:
        ring.close()


def test_keys_hold_for_a_minute_without_their_store_and_then_nobody_gets_in(home: Path) -> None:
    with open_store(home) as store:
        made = keys.create(store, "a", [Right.INFER])
        ring = KeyRing(store)
        ring.refresh()
        with store.begin() as connection:
            connection.execute(sa.text("ALTER TABLE api_keys RENAME COLUMN sha256 TO gone"))

        async def ask() -> None:
            await ring.read_again()

        asyncio.run(ask())
        assert ring.find(made.text) == made.key
        ring._known = type(ring._known)(ring._known.read_at - 60, ring._known.keys)
        assert ring.needs_reading()
        with pytest.raises(KeysUnavailableError):
            asyncio.run(ask())
        ring.close()


def test_ids_are_the_only_part_of_keys_in_the_table(store: Store) -> None:
    made = keys.create(store, "a", [Right.INFER])
    with store.read() as connection:
        [row] = connection.execute(sa.select(api_keys)).mappings()
    assert row["sha256"] == keys.digest_of(made.text)
    assert not [value for value in row.values() if made.text[-20:] in str(value)]
