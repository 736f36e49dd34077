"""Jobs: long work that outlives the page or command that asked for it, one child process each, its state in the store.

    Jobs          submit, get, list, cancel, wait, run: for pages, API, CLI and notebooks
    JobContext    what a kind's ``run(spec, context)`` is given: progress, partial results, cancellation
    JobRunner     takes queued jobs up and runs each in a process of its own: for the app

A kind is a module with ``check(spec)`` and ``run(spec, context)``, named in ``workbench.jobs.model.KINDS``.
"""

from workbench.jobs.context import JobContext
from workbench.jobs.model import (
    KINDS,
    RESUMABLE,
    Job,
    JobCancelled,
    JobError,
    JobInterrupted,
    JobSpecError,
    JobState,
    JobStateError,
    JobTimeoutError,
    UnknownJobError,
    UnknownJobKindError,
)
from workbench.jobs.runner import JobRunner
from workbench.jobs.table import Jobs

__all__ = [
    "KINDS",
    "RESUMABLE",
    "Job",
    "JobCancelled",
    "JobContext",
    "JobError",
    "JobInterrupted",
    "JobRunner",
    "JobSpecError",
    "JobState",
    "JobStateError",
    "JobTimeoutError",
    "Jobs",
    "UnknownJobError",
    "UnknownJobKindError",
]
