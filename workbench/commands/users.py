"""`quire users`: who may log in with a password: add, list, passwd, remove. A running app knows within a second."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import settings as settings_module

if TYPE_CHECKING:
    from workbench.access.users import User, UserFile


def add(commands: Any) -> None:
    """Add `quire users add|list|passwd|remove`."""
    parser = commands.add_parser("users", help="who may log in to the pages with a password")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    adding = actions.add_parser("add", help="a new user; the password is asked for, or read from a pipe")
    adding.add_argument("name")
    roles = adding.add_mutually_exclusive_group()
    roles.add_argument("--admin", action="store_true", help="may load models, run jobs, move aliases")
    roles.add_argument("--viewer", action="store_true", help="may look, and ask no model")
    _common(adding, _add)
    _common(actions.add_parser("list", help="names, roles, and since when the password is theirs"), _list)
    for name, run, text in (
        ("passwd", _passwd, "set a user's password; their sessions end"),
        ("remove", _remove, "take a user away; their sessions end"),
    ):
        one = actions.add_parser(name, help=text)
        one.add_argument("name")
        _common(one, run)


def _common(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--home-dir", type=Path, help="where everything is kept (HOME_DIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=run)


def _file(arguments: argparse.Namespace) -> UserFile:
    """Of the HOME_DIR, whatever host the environment names: the first user is what makes that host possible."""
    from workbench.access.users import UserFile

    settings = settings_module.load(home_dir=arguments.home_dir, host="127.0.0.1")
    settings_module.prepare_home(settings)
    return UserFile(settings.home_dir)


def _add(arguments: argparse.Namespace) -> int:
    from workbench.access.users import Role

    role = Role.ADMIN if arguments.admin else Role.VIEWER if arguments.viewer else Role.USER
    user = _file(arguments).add(arguments.name, _password(), role)
    _tell(arguments, {"user": _facts(user)}, f"{user.name} ({user.role}) may log in.")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    found = _file(arguments).list()
    lines = [f"{user.name}  {user.role}  {user.changed_at}" for user in found]
    _tell(arguments, {"users": [_facts(user) for user in found]}, *(lines or ["No users."]))
    return 0


def _passwd(arguments: argparse.Namespace) -> int:
    user = _file(arguments).set_password(arguments.name, _password())
    _tell(arguments, {"user": _facts(user)}, f"{user.name} has a new password and is logged out everywhere.")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    _file(arguments).remove(arguments.name)
    _tell(arguments, {"removed": arguments.name}, f"{arguments.name} is removed and logged out.")
    return 0


def _password() -> str:
    """Never from an argument: those are for every process to read."""
    from workbench.access.users import UserError

    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    given = getpass.getpass("Password: ")
    if getpass.getpass("Once more: ") != given:
        raise UserError("the two passwords differ", param="password", remedy="Try again.")
    return given


def _facts(user: User) -> dict[str, str]:
    return {"name": user.name, "role": user.role.value, "changed_at": user.changed_at}


def _tell(arguments: argparse.Namespace, facts: dict[str, Any], *lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(facts))
