"""`quire keys`: API keys: make one (its text is shown once), list them, revoke one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import settings as settings_module
from workbench.access.principal import Right

if TYPE_CHECKING:
    from workbench.access.keys import ApiKey
    from workbench.store import Store


def add(commands: Any) -> None:
    """Add `quire keys create|list|revoke`."""
    parser = commands.add_parser("keys", help="API keys: make, list, revoke")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    making = actions.add_parser("create", help="make a key; the server asks for keys from then on")
    making.add_argument("name", help="who or what will use it")
    making.add_argument(
        "--right", action="append", choices=[right.value for right in Right], required=True, dest="rights",
        help="infer: ask models; read: metrics and models; admin: everything; may be repeated",
    )  # fmt: skip
    making.add_argument("--requests-per-minute", type=int)
    making.add_argument("--tokens-per-minute", type=int, help="prompt and output tokens")
    making.add_argument("--max-concurrent", type=int, help="requests at once")
    making.add_argument("--daily-tokens", type=int, help="prompt and output tokens of a day in UTC")
    making.add_argument("--expires-days", type=int, help="how long it lives; default: until it is revoked")
    _common(making, _create)

    _common(actions.add_parser("list", help="all keys, newest first"), _list)

    revoking = actions.add_parser("revoke", help="have a key open nothing any more")
    revoking.add_argument("id", help="as `quire keys list` shows it")
    _common(revoking, _revoke)


def _common(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--home-dir", type=Path, help="where everything is kept (HOME_DIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=run)


@contextmanager
def _open(arguments: argparse.Namespace) -> Iterator[Store]:
    settings = settings_module.load(home_dir=arguments.home_dir)
    settings_module.prepare_home(settings)
    from workbench.store import open_store

    with open_store(settings.home_dir) as store:
        yield store


def _create(arguments: argparse.Namespace) -> int:
    from workbench.access.keys import KeyLimits, create

    limits = KeyLimits(**{field.name: getattr(arguments, field.name) for field in fields(KeyLimits)})
    with _open(arguments) as store:
        made = create(
            store, arguments.name, map(Right, arguments.rights), limits, expires_days=arguments.expires_days
        )
    if arguments.json:
        print(json.dumps({"key": made.text, **_facts(made.key)}))
        return 0
    print(_line(made.key), "This is the only time that the key is shown:", sep="\n", file=sys.stderr)
    print(made.text)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from workbench.access.keys import listed

    with _open(arguments) as store:
        found = listed(store)
    _tell(
        arguments, {"keys": [_facts(key) for key in found]}, *([_line(key) for key in found] or ["No keys."])
    )
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    from workbench.access.keys import revoke

    with _open(arguments) as store:
        revoked = revoke(store, arguments.id)
    _tell(arguments, {"revoked": _facts(revoked)}, f"{revoked.id} ({revoked.name}) is revoked.")
    return 0


def _facts(key: ApiKey) -> dict[str, Any]:
    names = ("id", "name", "rights", "created_at", "created_by", "expires_at", "last_used_at", "revoked_at")
    return {**{name: getattr(key, name) for name in names}, "limits": key.limits.as_dict()}


def _line(key: ApiKey) -> str:
    limits = ", ".join(f"{name} {value}" for name, value in key.limits.as_dict().items()) or "no limits"
    if key.revoked_at is not None:
        state = f"revoked {key.revoked_at[:19]}"
    else:
        state = f"used {key.last_used_at[:19]}" if key.last_used_at else "never used"
        state += f", until {key.expires_at[:19]}" if key.expires_at else ""
    return f"{key.id}  {key.name}  {' '.join(key.rights)}  {limits}  made {key.created_at[:19]}  {state}"


def _tell(arguments: argparse.Namespace, facts: dict[str, Any], *lines: str) -> None:
    if arguments.json:
        print(json.dumps(facts))
    else:
        print("\n".join(lines))
