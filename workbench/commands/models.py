"""`quire models`: what is resident in the running app, and loading, unloading, sleep and waking of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import settings as settings_module
from workbench.commands import engine_options
from workbench.resident_format import told

if TYPE_CHECKING:
    from workbench.backends.app_client import AppClient


def add(commands: Any) -> None:
    """Add `quire models list|load|unload|sleep|wake`."""
    parser = commands.add_parser(
        "models", help="what is resident in the running app: load, unload, sleep, wake"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    _common(actions.add_parser("list", help="every resident with its state, memory and aliases"), _list)

    loading = actions.add_parser(
        "load", help="make a version resident; adapters over a resident base where possible"
    )
    loading.add_argument("ref", help="a folder, a hub id, NAME/3 or NAME@alias")
    engine_options.add(loading)
    loading.add_argument(
        "--deterministic", action="store_true", help="bitwise repeatable, in an engine of its own"
    )
    _common(loading, _load)

    unloading = actions.add_parser("unload", help="let a version go; its running requests end first")
    unloading.add_argument("id")
    _common(unloading, _unload)

    sleeping = actions.add_parser(
        "sleep", help="give a model's device memory to others; its running requests end first"
    )
    sleeping.add_argument("id")
    sleeping.add_argument(
        "--level",
        type=int,
        default=1,
        help="1 keeps the weights in host memory (default), 2 loads them again",
    )
    _common(sleeping, _sleep)

    waking = actions.add_parser("wake", help="have a model that sleeps take requests again")
    waking.add_argument("id")
    _common(waking, _wake)


def _common(
    parser: argparse.ArgumentParser, act: Callable[[AppClient, argparse.Namespace], dict[str, Any]]
) -> None:
    parser.add_argument("--home-dir", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=lambda arguments: _run(arguments, act))


def _run(
    arguments: argparse.Namespace, act: Callable[[AppClient, argparse.Namespace], dict[str, Any]]
) -> int:
    from workbench.backends.app_client import AppClient
    from workbench.errors import ServerUnreachableError
    from workbench.run_state import RunState

    settings = settings_module.load(home_dir=arguments.home_dir)
    app = RunState(settings.run_dir).read()
    if app is None:
        raise ServerUnreachableError(
            f"no app runs under {settings.home_dir}", value=str(settings.home_dir), param="HOME_DIR",
            remedy="Start one with `quire up` or `quire serve`.",
        )  # fmt: skip
    with AppClient(app) as client:
        facts = act(client, arguments)
    told = [_line(each) for each in facts.get("residents", [facts])] if facts else ["done"]
    print("\n".join(told), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(facts))
    return 0


def _list(client: AppClient, arguments: argparse.Namespace) -> dict[str, Any]:
    found = client.residents()
    return {
        "residents": [*found["residents"], *found["loading"], *found["draining"]],
        "followed": found["followed"],
    }


def _load(client: AppClient, arguments: argparse.Namespace) -> dict[str, Any]:
    exact = {"deterministic": True} if arguments.deterministic else {}
    return client.pin(arguments.ref, {**engine_options.chosen(arguments), **exact})


def _unload(client: AppClient, arguments: argparse.Namespace) -> dict[str, Any]:
    client.drop(arguments.id)
    return {}


def _sleep(client: AppClient, arguments: argparse.Namespace) -> dict[str, Any]:
    return client.sleep(arguments.id, arguments.level)


def _wake(client: AppClient, arguments: argparse.Namespace) -> dict[str, Any]:
    return client.wake_up(arguments.id)


def _line(resident: dict[str, Any]) -> str:
    named = " ".join(resident["aliases"])
    size = "" if resident["memory_bytes"] is None else f"{resident['memory_bytes'] / 1e6:.1f} MB"
    how = f"adapter of {resident['parent']}" if resident["parent"] else ""
    if resident["merged_because"]:
        how = f"merged: {resident['merged_because']}"
    return f"{resident['id']:28} {resident['phase']:9} {size:>12}  {resident['digest'][:12]:12}  {named} {how}  {told(resident)}".rstrip()
