"""``python -m workbench.runs.scheduler``: fires schedules when they are due, in a process of its own.

It decides and writes; the jobs that it submits are run by the app's JobRunner. ``--run-jobs`` runs them here, for a machine
without an app. All state is in the store: it may be killed and started again at any moment.

Boundary: the loop. What firing means is ``workbench.runs.schedules``'.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from types import FrameType

from workbench import settings as settings_module
from workbench.guard import die_with_parent
from workbench.jobs.runner import JobRunner
from workbench.jobs.table import Jobs
from workbench.logs import configure_logging
from workbench.runs.schedules import Schedules
from workbench.settings import Settings
from workbench.store import StoreError, open_store

log = logging.getLogger(__name__)
POLL_S = 1.0  # others add schedules at any time


def run(schedules: Schedules, stop: threading.Event) -> None:
    """Fire what is due until `stop` is set."""
    failing = False
    while not stop.is_set():
        try:
            for occurrence in schedules.fire_due():
                log.info("%s: %s %s", occurrence.id, occurrence.outcome, occurrence.reason)
            pause = _until(schedules.next_due())
            failing = False
        except StoreError as error:  # a full or busy disk passes; what was due is decided then
            if not failing:
                log.warning("schedules wait for the store: %s", error)
            failing, pause = True, POLL_S
        stop.wait(pause)


def main() -> int:
    """Run until SIGTERM or SIGINT, or until the supervisor is gone."""
    parser = argparse.ArgumentParser(prog="python -m workbench.runs.scheduler")
    parser.add_argument("--run-jobs", action="store_true", help="run the jobs here: there is no app")
    arguments = parser.parse_args()
    parent = os.environ.pop("QUIRE_SUPERVISOR_PID", "")
    if parent:
        die_with_parent(int(parent))
    stop = threading.Event()

    def on_stop(signum: int, frame: FrameType | None) -> None:
        stop.set()

    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, on_stop)
    settings = settings_module.load()
    settings_module.prepare_home(settings)
    configure_logging(settings.log_level, settings.log_format)
    with ExitStack() as held:
        store = held.enter_context(open_store(settings.home_dir))
        if arguments.run_jobs:
            held.enter_context(_job_runner(Jobs(store, settings.home_dir), settings))
        run(Schedules(store, settings.home_dir), stop)
    return 0


@contextmanager
def _job_runner(jobs: Jobs, settings: Settings) -> Iterator[None]:
    runner = JobRunner(jobs, settings)
    runner.start()
    try:
        yield
    finally:
        runner.close()


def _until(due: datetime | None) -> float:
    left = POLL_S if due is None else (due - datetime.now(UTC)).total_seconds()
    return min(max(left, 0.0), POLL_S)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
