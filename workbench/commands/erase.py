"""`quire erase`: what is kept of a user, a session or a request is removed from the log, feedback, traces and datasets."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import exit_codes
from workbench import settings as settings_module
from workbench.errors import NotReadyError

if TYPE_CHECKING:
    from workbench.observe.erase import Kind, Subject
    from workbench.settings import Settings


def add(commands: Any) -> None:
    """Add `quire erase`."""
    parser = commands.add_parser(
        "erase", help="remove what is kept of a user, a session or a request; finishes what a crash left"
    )
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument(
        "--user", help="an end user as requests name them (user, safety_identifier), or a login"
    )
    whose.add_argument("--session", help="a session (header x-session-id, or metadata.session_id)")
    whose.add_argument("--request", help="a request's id, as x-request-id or the answer's id has it")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be removed, and remove nothing"
    )
    parser.add_argument(
        "--without-mlflow", action="store_true", help="leave its traces and datasets, where it is gone for good"
    )  # fmt: skip
    parser.add_argument("--home-dir", type=Path, help="where everything is kept (HOME_DIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=_erase)


def _erase(arguments: argparse.Namespace) -> int:
    from workbench.observe.erase import Subject, erase
    from workbench.store import open_store

    settings = settings_module.load(home_dir=arguments.home_dir)
    settings_module.prepare_home(settings)
    kinds: tuple[Kind, ...] = ("user", "session", "request")
    kind = next(each for each in kinds if getattr(arguments, each) is not None)
    with open_store(settings.home_dir) as store:
        done = erase(
            settings, store, Subject(kind, getattr(arguments, kind)), dry_run=arguments.dry_run, rotate=_rotation(settings),
            with_mlflow=not arguments.without_mlflow,
        )  # fmt: skip
    said = "Would remove" if done.dry_run else "Removed"
    print(
        f"{said} of {done.kind} {done.id}: {done.requests} requests of the log, {done.feedback} feedback, "
        f"{done.traces} traces, {done.dataset_records} records and {done.dataset_examples} lines of datasets.",
        *(f"Left: {each}." for each in done.left), sep="\n", file=sys.stderr if arguments.json else sys.stdout,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(done.as_dict()))
    return exit_codes.FAILURE if done.left and not done.dry_run else 0


def _rotation(settings: Settings) -> Callable[[Subject], None] | None:
    """How to have the running app write everything out; None where none runs."""
    from workbench.backends.app_client import AppClient
    from workbench.run_state import RunState

    app = RunState(settings.run_dir).read()
    if app is None:
        return None

    def rotate(subject: Subject) -> None:
        with AppClient(app) as client:
            if not client.rotate_request_log(subject.kind, subject.id):
                raise NotReadyError(
                    "the running app could not write its request log out", remedy="Look at its log, and try again."
                )  # fmt: skip

    return rotate
