"""JobContext: what a running job has of the outside: where to tell progress, where to keep results, whether to end.

Boundary: given to a kind's ``run``; it writes only the job's own row.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench.jobs.model import JobCancelled, JobStateError
from workbench.jobs.process_id import ProcessId
from workbench.jobs.table import Jobs
from workbench.settings import Settings
from workbench.store import StoreError

_REPORT_INTERVAL_S = 0.25  # progress may come for every token; the store sees so much of it
OnProgress = Callable[[float, str], None]


class JobContext:
    """One job's connection to the store. `report` and `partial` may be called from any thread."""

    def __init__(
        self, jobs: Jobs, job_id: str, owner: ProcessId, settings: Settings, on_progress: OnProgress | None
    ) -> None:
        job = jobs.get(job_id)
        self.job_id = job_id
        self.title = job.title
        self.home_dir = jobs.home_dir
        self.settings = settings
        self.resumed: dict[str, Any] | None = job.partial  # what an earlier attempt had stored
        self._jobs = jobs
        self._owner = owner
        self._on_progress = on_progress
        self._cancel = threading.Event()
        self._lock = threading.Lock()
        self._written = -1.0
        self._message = ""

    @property
    def folder(self) -> Path:
        """A folder of this job's own, the same for each attempt: checkpoints, files to attach."""
        folder = self.home_dir / "jobs" / self.job_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def report(self, fraction: float, message: str) -> None:
        """Say how far the work is (0 to 1) and what it does. Cheap to call often; a store that is busy costs nothing."""
        if self._on_progress is not None:
            self._on_progress(fraction, message)
        with self._lock:
            now = time.monotonic()
            if message == self._message and now - self._written < _REPORT_INTERVAL_S and fraction < 1:
                return
            self._written, self._message = now, message
        with contextlib.suppress(StoreError):  # progress is not worth the work that it tells of
            self._jobs.claims.progress(self.job_id, self._owner, fraction, message)

    def partial(self, value: dict[str, Any]) -> None:
        """Store what there is so far, in place of what was stored before; it outlasts crash and cancel.

        Raises:
            StoreError: it could not be stored (StoreFullError: the disk is full).
            JobStateError: the job was taken from this process.
        """
        if not self._jobs.claims.store_partial(self.job_id, self._owner, value):
            raise JobStateError(f"job {self.job_id} is not run by this process any more", value=self.job_id)

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked the job to end."""
        return self._cancel.is_set()

    def check_cancelled(self) -> None:
        """Raise JobCancelled if somebody asked the job to end."""
        if self.cancelled:
            raise JobCancelled("the job was cancelled", value=self.job_id)

    def request_cancel(self) -> None:
        """Make `cancelled` true: for who watches the job's row."""
        self._cancel.set()
