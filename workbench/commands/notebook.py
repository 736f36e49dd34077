"""`quire notebook`: which notebooks there are, and running one with parameters, in the running app or here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from workbench import exit_codes
from workbench import settings as settings_module


def add(commands: Any) -> None:
    """Add `quire notebook list|run`."""
    parser = commands.add_parser("notebook", help="run a notebook with parameters")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = actions.add_parser("list", help="the notebooks and their parameters")
    _common(listing)
    listing.set_defaults(run=_list)

    run = actions.add_parser("run", help="run one; its executed form and record go to MLflow")
    run.add_argument("name", help="a notebook's name, as `quire notebook list` shows it")
    run.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", help="may be given several times"
    )  # fmt: skip
    _common(run)
    run.set_defaults(run=_run)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home-dir", type=Path, help="where everything is kept (HOME_DIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def _list(arguments: argparse.Namespace) -> int:
    from workbench.runs.notebooks import discover

    found = discover(settings_module.load(home_dir=arguments.home_dir))
    if arguments.json:
        print(json.dumps({"notebooks": [_facts(each) for each in found]}))
        return 0
    for notebook in found:
        print(f"{notebook.name}: {notebook.title}")
        if notebook.error is not None:
            print(f"    cannot be run: {notebook.error}")
        for each in notebook.parameters:
            print(f"    {each.name}: {each.type_text} = {each.default!r}  {each.comment}".rstrip())
    return 0


def _facts(notebook: Any) -> dict[str, Any]:
    parameters = [
        {"name": each.name, "type": each.type_text, "default": each.default, "comment": each.comment}
        for each in notebook.parameters
    ]
    error = None if notebook.error is None else str(notebook.error)
    return {
        "name": notebook.name,
        "title": notebook.title,
        "description": notebook.description,
        "path": str(notebook.path),
        "parameters": parameters,
        "error": error,
    }


def _run(arguments: argparse.Namespace) -> int:
    settings = settings_module.load(home_dir=arguments.home_dir)
    settings_module.prepare_home(settings)
    from workbench.jobs import Jobs, JobState
    from workbench.runs.notebooks import find
    from workbench.runs.parameters import read_assignments
    from workbench.store import open_store

    notebook = find(arguments.name, settings)
    given = read_assignments(notebook.parameters, arguments.parameter, notebook.name)
    with open_store(settings.home_dir) as store:
        job = Jobs(store, settings.home_dir).run(
            "notebook", {"notebook": notebook.name, "parameters": given}, title=notebook.name,
            on_progress=lambda fraction, message: print(f"{fraction:4.0%} {message}", file=sys.stderr),
        )  # fmt: skip
    _tell(job, as_json=arguments.json)
    return 0 if job.state is JobState.DONE else exit_codes.FAILURE


def _tell(job: Any, *, as_json: bool) -> None:
    facts = job.result or job.partial or {}
    if as_json:
        error = job.error
        print(json.dumps({"job_id": job.id, "state": job.state.value, "error": error, **facts}, default=str))
        return
    print(f"{job.title}: {job.state.value}" + (f" — {job.message}" if job.error else ""))
    record = facts.get("record")
    for name, value in (record["values"] if record else {}).items():
        print(f"    {name} = {value}")
    for name in ("executed", "run_id"):
        if facts.get(name):
            print(f"    {name}: {facts[name]}")
