"""Retention: what people wrote is kept for QUIRE_RETENTION_DAYS, and then removed, once a day, beside the event loop.

It holds for the request log (whole files, when their newest request is older), for feedback, and for the logs of ended jobs. The newest
file of the request log always stays. What is kept as a result is not touched: executed notebooks, benchmarks, comparisons, datasets,
MLflow's runs; nor are MLflow's traces, which have a retention of MLflow's own. Steps are kept in memory only.

Boundary: what is too old, and removing it. Removing by whose it is, is `erase`'s.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from workbench.errors import WorkbenchError
from workbench.observe import segments
from workbench.store import feedback_outbox, jobs, utc_text

if TYPE_CHECKING:
    from workbench.store import Store

log = logging.getLogger(__name__)
_EVERY_S = 24 * 3600.0
_FIRST_AFTER_S = 60.0  # not while the app starts


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept now, or was removed by one run."""

    request_log_files: int
    request_log_bytes: int
    feedback: int
    job_logs: int


def enforce(home_dir: Path, store: Store, days: float) -> Kept:
    """Remove what is older than `days`; what was removed. Raises StoreError, OSError."""
    earliest = datetime.now(UTC) - timedelta(days=days)
    files = num_bytes = 0
    folder = segments.folder_of(home_dir)
    with segments.tidying(folder):
        closed = segments.parquet_files(folder)
        for path in closed[:-1]:
            if segments.last_finish(path) < earliest:
                num_bytes += path.stat().st_size
                path.unlink()
                files += 1
    with store.begin() as connection:
        old = feedback_outbox.c.created_at < utc_text(earliest)
        feedback = connection.execute(sa.delete(feedback_outbox).where(old)).rowcount
    return Kept(files, num_bytes, feedback, _remove_job_logs(store, earliest))


def kept(home_dir: Path, store: Store) -> Kept:
    """What is kept now. Raises StoreError."""
    files = segments.parquet_files(segments.folder_of(home_dir))
    with store.read() as connection:
        feedback = connection.execute(sa.select(sa.func.count()).select_from(feedback_outbox)).scalar_one()
        paths = connection.execute(sa.select(jobs.c.log_path)).scalars().all()
    return Kept(
        len(files), sum(path.stat().st_size for path in files), feedback,
        sum(1 for path in paths if Path(path).is_file()),
    )  # fmt: skip


def _remove_job_logs(store: Store, earliest: datetime) -> int:
    """Logs of jobs that ended before; their rows, with results, stay."""
    with store.read() as connection:
        paths = connection.execute(
            sa.select(jobs.c.log_path).where(
                jobs.c.ended_at.is_not(None), jobs.c.ended_at < utc_text(earliest)
            )
        ).scalars()
        found = [Path(path) for path in paths]
    num_removed = 0
    for path in found:
        if path.is_file():
            path.unlink(missing_ok=True)
            num_removed += 1
    return num_removed


class RetentionKeeper:
    """Enforces it once a day, from a minute after the start on. Costs nothing without `days`."""

    def __init__(
        self, home_dir: Path, store: Store, days: float | None, *, first_after_s: float = _FIRST_AFTER_S
    ) -> None:
        self._home_dir = home_dir
        self._store = store
        self._days = days
        self._first_after_s = first_after_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quire-retention", daemon=True)

    def start(self) -> None:
        if self._days is not None:
            self._thread.start()

    def close(self) -> None:
        """End the thread; what it does now ends first."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        assert self._days is not None
        wait_s = self._first_after_s
        while not self._closing.wait(wait_s):
            wait_s = _EVERY_S
            try:
                removed = enforce(self._home_dir, self._store, self._days)
                log.info("older than %g days, removed: %s", self._days, removed)
            except (WorkbenchError, OSError) as error:  # tomorrow again
                log.warning("what is older than %g days could not be removed: %s", self._days, error)
