"""The job kind "notebook": runs one through papermill, in a kernel of its own, and logs what came out of it.

Spec: ``notebook`` (its name) and ``parameters``. Progress goes by cell; the executed notebook, whole or up to the cell that raised,
is kept in the job's folder and, with the notebook's record, in MLflow's experiment "quire/runs".

Boundary: one run. Reading notebooks and parameters is ``notebooks``' and ``parameters``', MLflow's side ``run_log``'s.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import settings as settings_module
from workbench.jobs.context import JobContext
from workbench.jobs.environment import child_environment
from workbench.jobs.model import JobInterrupted, JobSpecError
from workbench.runs import run_log
from workbench.runs.errors import NotebookFailedError
from workbench.runs.notebooks import Notebook, find
from workbench.runs.parameters import Scalar, check_values
from workbench.runs.record import Record, find_record
from workbench.settings import Settings

_FIELDS = {"notebook": str, "parameters": dict}
_TRACEBACK_LINES = 40
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def check(spec: dict[str, Any]) -> None:
    """As `check_in`, for the HOME_DIR of the environment."""
    check_in(spec, settings_module.load())


def check_in(spec: dict[str, Any], settings: Settings) -> None:
    """Raise for a run that could not start.

    Raises:
        JobSpecError: a field that is unknown, missing or of another type.
        UnknownNotebookError, NotebookFormatError, NotebookParameterError
    """
    _resolve(spec, settings)


def run(spec: dict[str, Any], context: JobContext) -> dict[str, Any]:
    """Run the notebook; the result has its record and where to find it.

    Raises:
        NotebookFailedError: a cell raised; what ran before it is kept.
        JobInterrupted: it was cancelled while a cell ran.
    """
    notebook, values = _resolve(spec, context.settings)
    context.report(0.0, "Reaching MLflow")
    run_log.check_reachable(context)
    executed = context.folder / f"{notebook.name}.ipynb"
    started = time.monotonic()
    failure: NotebookFailedError | None = None
    context.report(0.01, "Starting the kernel")
    try:
        with _environment(context.settings), _interrupted_by_cancel(context):
            _execute(notebook, values, executed, context)
    except NotebookFailedError as error:
        failure = error
    content = json.loads(executed.read_text("utf-8"))
    outcome = _Outcome(notebook, values, executed, time.monotonic() - started, find_record(content), failure)
    context.report(0.98, "Logging to MLflow")
    context.partial(outcome.facts())  # kept even if MLflow is gone by now
    result = {**outcome.facts(), "run_id": outcome.log(context)}
    if failure is not None:
        context.partial(result)
        raise failure
    return result


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a run left."""

    notebook: Notebook
    values: dict[str, Scalar]
    executed: Path
    seconds: float
    record: Record | None
    failure: NotebookFailedError | None

    def facts(self) -> dict[str, Any]:
        return {
            "notebook": self.notebook.name,
            "parameters": self.values,
            "executed": str(self.executed),
            "duration_s": round(self.seconds, 3),
            "record": None
            if self.record is None
            else {"kind": self.record.kind, "values": self.record.values},
            "failed_cell": None if self.failure is None else self.failure.value,
        }

    def log(self, context: JobContext) -> str:
        return run_log.log_run(
            context, self.notebook, self.values, self.executed, self.record, self.seconds,
            failed=self.failure is not None,
        )  # fmt: skip


def _resolve(spec: dict[str, Any], settings: Settings) -> tuple[Notebook, dict[str, Scalar]]:
    for name, value in spec.items():
        if name not in _FIELDS or not isinstance(value, _FIELDS[name]):
            raise JobSpecError(
                f"a notebook job cannot have {name}={value!r}", value=value, param=name,
                limit="notebook (a name) and parameters (an object)",
            )  # fmt: skip
    if "notebook" not in spec:
        raise JobSpecError("a notebook job needs the notebook's name", param="notebook")
    notebook = find(spec["notebook"], settings)
    return notebook, check_values(notebook.parameters, spec.get("parameters", {}), notebook.name)


def _execute(notebook: Notebook, values: dict[str, Scalar], executed: Path, context: JobContext) -> None:
    """Run all cells; `executed` appears at the end, whole, however it ended."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from workbench.runs.papermill_engine import ENGINE, reporting_cells

    growing = executed.with_suffix(".part.ipynb")
    try:
        with reporting_cells(context):
            papermill.execute_notebook(
                str(notebook.path), str(growing), parameters=values, engine_name=ENGINE, kernel_name="python3", language="python",
                progress_bar=False, stdout_file=sys.stderr, stderr_file=sys.stderr, start_timeout=120,
            )  # fmt: skip
    except PapermillExecutionError as error:
        raise _failed(notebook, error) from error
    finally:
        if growing.exists():
            os.replace(growing, executed)


def _failed(notebook: Notebook, error: Any) -> NotebookFailedError:
    lines = _ANSI.sub("", "\n".join(error.traceback or ())).splitlines()[-_TRACEBACK_LINES:]
    cell = {
        "cell": error.cell_index + 1,  # of the executed notebook
        "source": error.source[:2000],
        "error": error.ename,
        "message": error.evalue,
        "traceback": lines,
    }
    return NotebookFailedError(
        f"cell {cell['cell']} of {notebook.name!r} raised {error.ename}: {error.evalue}", value=cell,
        param="notebook", remedy="The executed notebook shows where; fix its cause and run it again.",
    )  # fmt: skip


@contextmanager
def _environment(settings: Settings) -> Iterator[None]:
    """The kernel inherits this process's environment: the same HOME_DIR, tracking server and packages."""
    before = dict(os.environ)
    os.environ.update(child_environment(settings, JUPYTER_PREFER_ENV_PATH="1"))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _interrupted_by_cancel(context: JobContext) -> Iterator[None]:
    """A cancel ends a cell that runs, by a signal to this thread; outside the main thread it waits for the cell's end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(signum: int, frame: object) -> None:
        raise JobInterrupted("Cancelled; the cells that ran before are kept")

    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if context.cancelled:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return

    before = signal.signal(signal.SIGUSR1, on_signal)
    thread = threading.Thread(target=watch, name="quire-cancel", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(5)
        signal.signal(signal.SIGUSR1, before)
