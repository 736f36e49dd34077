"""`quire schedule`: notebooks that run by themselves: add, list, pause, remove, and what became of each due time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workbench import settings as settings_module


def add(commands: Any) -> None:
    """Add `quire schedule add|list|pause|resume|remove|history`."""
    parser = commands.add_parser("schedule", help="run notebooks on a schedule")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    adding = actions.add_parser("add", help="run a notebook by cron, at an interval, or once")
    adding.add_argument("name", help="the schedule's name")
    adding.add_argument("--notebook", required=True, help="a notebook's name")
    adding.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    when = adding.add_mutually_exclusive_group(required=True)
    when.add_argument(
        "--cron", help='five fields, e.g. "0 3 * * *"; weekdays as crontab counts them (0 is Sunday)'
    )
    when.add_argument("--every", help="an interval: 90s, 5m, 1h, 1d")
    when.add_argument("--at", help="once, e.g. 2026-12-01T03:00")
    adding.add_argument("--timezone", help="of --cron and --at; default: this machine's")
    adding.add_argument("--grace", default="1h", help="how late a missed time may still run (default 1h)")
    _common(adding, _add)

    _common(actions.add_parser("list", help="the schedules, the next due first"), _list)
    for name, action, text in (
        ("pause", _pause, "stop firing until it is resumed"),
        ("resume", _resume, "fire again from now on"),
        ("remove", _remove, "take a schedule away; its history stays"),
    ):
        one = actions.add_parser(name, help=text)
        one.add_argument("name")
        _common(one, action)
    history = actions.add_parser("history", help="what became of each due time, newest first")
    history.add_argument("name", nargs="?", help="of one schedule; default: of all")
    history.add_argument("--limit", type=int, default=20)
    _common(history, _history)


def _common(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--home-dir", type=Path, help="where everything is kept (HOME_DIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=run)


@contextmanager
def _open(arguments: argparse.Namespace) -> Iterator[Any]:
    settings = settings_module.load(home_dir=arguments.home_dir)
    settings_module.prepare_home(settings)
    from workbench.runs.schedules import Schedules
    from workbench.store import open_store

    with open_store(settings.home_dir) as store:
        yield Schedules(store, settings.home_dir)


def _add(arguments: argparse.Namespace) -> int:
    from workbench.runs.notebooks import find
    from workbench.runs.parameters import read_assignments
    from workbench.runs.trigger import seconds_of

    notebook = find(arguments.notebook, settings_module.load(home_dir=arguments.home_dir))
    given = read_assignments(notebook.parameters, arguments.parameter, notebook.name)
    with _open(arguments) as schedules:
        added = schedules.add(
            arguments.name, notebook.name, given, cron=arguments.cron, at=arguments.at,
            every_s=None if arguments.every is None else seconds_of(arguments.every),
            timezone=arguments.timezone, grace_s=seconds_of(arguments.grace),
        )  # fmt: skip
    _tell(arguments, {"schedule": _facts(added)}, _line(added))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    with _open(arguments) as schedules:
        found = schedules.list()
    _tell(
        arguments,
        {"schedules": [_facts(each) for each in found]},
        *([_line(each) for each in found] or ["No schedules."]),
    )
    return 0


def _pause(arguments: argparse.Namespace) -> int:
    return _enable(arguments, False)


def _resume(arguments: argparse.Namespace) -> int:
    return _enable(arguments, True)


def _enable(arguments: argparse.Namespace, enabled: bool) -> int:
    with _open(arguments) as schedules:
        changed = schedules.enable(arguments.name, enabled)
    _tell(arguments, {"schedule": _facts(changed)}, _line(changed))
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    with _open(arguments) as schedules:
        removed = schedules.remove(arguments.name)
    _tell(arguments, {"removed": _facts(removed)}, f"{removed.name} is removed.")
    return 0


def _history(arguments: argparse.Namespace) -> int:
    with _open(arguments) as schedules:
        found = schedules.history(arguments.name, arguments.limit)
    lines = [
        f"{each.due_at[:19]}  {each.schedule_name}  {each.outcome}"
        + (f"  job {each.job_id} {each.job_state.value if each.job_state else ''}" if each.job_id else "")
        + (f"  {each.reason}" if each.reason else "")
        for each in found
    ]
    _tell(arguments, {"history": [asdict(each) for each in found]}, *(lines or ["Nothing was due yet."]))
    return 0


def _facts(schedule: Any) -> dict[str, Any]:
    return {**asdict(schedule), "when": schedule.when}


def _line(schedule: Any) -> str:
    due = (
        "paused"
        if not schedule.enabled
        else f"next {schedule.next_due_at[:19]} UTC"
        if schedule.next_due_at
        else "over"
    )
    return f"{schedule.name}: {schedule.notebook}, {schedule.when}; {due}"


def _tell(arguments: argparse.Namespace, facts: dict[str, Any], *lines: str) -> None:
    if arguments.json:
        print(json.dumps(facts, default=str))
    else:
        print("\n".join(lines))
