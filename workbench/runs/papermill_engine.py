"""papermill's own engine, telling a job's context which cell runs.

Boundary: progress. papermill finds engines by name in a registry of its own, so the context is handed over beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from papermill.engines import NBClientEngine, papermill_engines

from workbench.jobs.context import JobContext

ENGINE = "quire"
_context: ContextVar[JobContext | None] = ContextVar("quire_notebook_job", default=None)
_BEFORE, _CELLS = 0.03, 0.94  # shares of the whole: kernel start, cells; the rest is logging


class ReportingEngine(NBClientEngine):  # type: ignore[misc]  # papermill has no types
    """Runs cells as papermill does and reports each."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        context = _context.get()
        if context is not None:
            _report_cells(nb_man, context)
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


@contextmanager
def reporting_cells(context: JobContext) -> Iterator[None]:
    """Runs by ENGINE report to `context` while this is open."""
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


def _report_cells(nb_man: Any, context: JobContext) -> None:
    total = len(nb_man.nb.cells)
    start = nb_man.cell_start

    def cell_start(cell: Any, cell_index: int | None = None, **more: Any) -> Any:
        context.check_cancelled()
        at = cell_index or 0
        if cell.cell_type == "code":
            context.report(
                _BEFORE + _CELLS * at / total, f"Cell {at + 1} of {total}: {_first_line(cell.source)}"
            )
        return start(cell, cell_index, **more)

    nb_man.cell_start = cell_start


def _first_line(source: str) -> str:
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    return (lines[0] if lines else "empty")[:60]


def _names_were_checked(entry: logging.LogRecord) -> bool:
    """papermill calls every optional parameter unknown, because it cannot read `x: str | None = None`."""
    return not str(entry.msg).startswith("Passed unknown parameter")


papermill_engines.register(ENGINE, ReportingEngine)
logging.getLogger("papermill").addFilter(_names_were_checked)
