"""`quire versions`: what is registered, where the aliases point, and moving them forth and back."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import settings as settings_module

if TYPE_CHECKING:
    from workbench.versions.registry import Registry, VersionInfo


def add(commands: Any) -> None:
    """Add `quire versions list|show|register|promote|rollback|history`."""
    parser = commands.add_parser("versions", help="registered model versions and their aliases")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = actions.add_parser("list", help="every version with its aliases, digest and figures")
    listing.add_argument("name", nargs="?", help="of this name only")
    _common(listing, _list)

    showing = actions.add_parser("show", help="one version with its lineage")
    showing.add_argument("ref", help="NAME/3 or NAME@alias")
    _common(showing, _show)

    registering = actions.add_parser(
        "register", help="register a folder, by reference, with or without an adapter"
    )
    registering.add_argument("name")
    registering.add_argument("--base", required=True, help="folder of the whole model")
    registering.add_argument("--adapter", type=Path, help="folder of a LoRA adapter of that base")
    registering.add_argument("--description", default="")
    _common(registering, _register)

    promoting = actions.add_parser("promote", help="point an alias at a version")
    promoting.add_argument("ref", help="NAME/3 or NAME@alias")
    promoting.add_argument("--alias", default="champion", help="which alias to move (default champion)")
    promoting.add_argument("--reason", default="", help="kept in the history")
    _common(promoting, _promote)

    for action, run, text in (
        ("rollback", _rollback, "point an alias back at the version that it named before"),
        ("history", _history, "every move of an alias, oldest first"),
    ):
        one = actions.add_parser(action, help=text)
        one.add_argument("name")
        one.add_argument("--alias", default="champion")
        if action == "rollback":
            one.add_argument("--reason", default="", help="kept in the history")
        _common(one, run)


def _common(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--home-dir", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=run)


def _registry(arguments: argparse.Namespace) -> Registry:
    from workbench.versions.registry import Registry

    settings = settings_module.load(home_dir=arguments.home_dir)
    settings_module.prepare_home(settings)
    return Registry(settings)


def _list(arguments: argparse.Namespace) -> int:
    found = _registry(arguments).versions(arguments.name)
    lines = [_line(info) for info in found] or ["nothing is registered"]
    return _told(arguments, lines, {"versions": [_facts(info) for info in found]})


def _show(arguments: argparse.Namespace) -> int:
    info = _get(_registry(arguments), arguments.ref)
    facts = _facts(info)
    return _told(arguments, [f"{key:14} {value}" for key, value in facts.items()], facts)


def _register(arguments: argparse.Namespace) -> int:
    registry = _registry(arguments)
    ref = registry.register(
        arguments.name, base=arguments.base, adapter=arguments.adapter, description=arguments.description
    )
    return _told(arguments, [f"{ref.id} is {ref.digest}"], asdict(ref))


def _promote(arguments: argparse.Namespace) -> int:
    registry = _registry(arguments)
    info = _get(registry, arguments.ref)
    version = info.ref.version
    assert version is not None, "a registered version has a number"
    ref = registry.promote(info.ref.name, version, alias=arguments.alias, reason=arguments.reason)
    return _told(arguments, [f"{ref.name}@{arguments.alias} is version {ref.version}"], asdict(ref))


def _rollback(arguments: argparse.Namespace) -> int:
    ref = _registry(arguments).rollback(arguments.name, alias=arguments.alias, reason=arguments.reason)
    return _told(arguments, [f"{ref.name}@{arguments.alias} is version {ref.version} again"], asdict(ref))


def _history(arguments: argparse.Namespace) -> int:
    moves = _registry(arguments).history(arguments.name, arguments.alias)
    lines = [
        f"{move.at[:19]}  {move.from_version or '–'} → {move.to_version or '–'}  {move.reason}  {move.who}"
        for move in moves
    ]
    return _told(arguments, lines or ["the alias was never set"], {"moves": [asdict(move) for move in moves]})


def _get(registry: Registry, ref: str) -> VersionInfo:
    from workbench.versions.errors import UnknownVersionError
    from workbench.versions.ref import parse_address

    address = parse_address(ref)
    if address is None:
        raise UnknownVersionError(
            f"{ref!r} names no registered version", value=ref, limit="NAME/3 or NAME@alias", param="ref",
            remedy="`quire versions list` shows what there is.",
        )  # fmt: skip
    return registry.get(address.name, f"@{address.alias}" if address.alias else str(address.version))


def _facts(info: VersionInfo) -> dict[str, Any]:
    return {"id": info.ref.id, **asdict(info)}


def _line(info: VersionInfo) -> str:
    named = " ".join(f"@{alias}" for alias in info.aliases)
    figures = "  ".join(f"{name} {value:.3g}" for name, value in info.metrics.items())
    return f"{info.ref.id:24} {named:22} {info.ref.digest[:12]}  {info.size_bytes / 1e6:8.1f} MB  {figures}"


def _told(arguments: argparse.Namespace, lines: list[str], facts: dict[str, Any]) -> int:
    print("\n".join(lines), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(facts))
    return 0
