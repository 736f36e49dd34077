"""`quire audit`: who changed what the server does, newest last."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workbench import settings as settings_module
from workbench.errors import SettingsError


def add(commands: Any) -> None:
    """Add `quire audit`."""
    parser = commands.add_parser("audit", help="who loaded, moved, made, revoked, started or cancelled what")
    parser.add_argument("--last", type=int, default=20, metavar="N", help="how many acts (default 20)")
    parser.add_argument("--home-dir", type=Path, help="where everything is kept (HOME_DIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the last acts."""
    if arguments.last < 1:
        raise SettingsError(
            f"--last must be at least 1, got {arguments.last}", value=arguments.last, limit=1, param="--last",
            remedy="Leave it out for the last 20.",
        )  # fmt: skip
    settings = settings_module.load(home_dir=arguments.home_dir)
    settings_module.prepare_home(settings)
    from workbench.access import audit
    from workbench.store import open_store

    with open_store(settings.home_dir) as store:
        found = audit.latest(store, arguments.last)[::-1]
    if arguments.json:
        print(json.dumps({"acts": [asdict(each) for each in found]}))
        return 0
    lines = [
        f"{each.at[:19]}  {each.principal}  {each.act}  {each.target}  {each.outcome}  {each.detail}".rstrip()
        for each in found
    ]
    print("\n".join(lines or ["Nothing was done yet."]))
    return 0
