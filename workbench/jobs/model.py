"""Job: one piece of long work as everyone sees it, its states, its kinds, and its errors.

Boundary: values. Where jobs are kept is ``workbench.jobs.table``'s, who runs them ``workbench.jobs.runner``'s.
"""

from __future__ import annotations

import errno
import importlib
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol, cast

from workbench.errors import WorkbenchError

Device = Literal["none", "shared", "exclusive"]
DEVICES: tuple[Device, ...] = ("none", "shared", "exclusive")

# The module of each kind has `check(spec) -> None` (typed errors, cheap) and `run(spec, context) -> dict`.
KINDS: dict[str, str] = {
    "benchmark": "workbench.bench.job",
    "compare": "workbench.evals.job",
    "gate": "workbench.evals.gate_job",
    "finetune": "workbench.versions.finetune_job",
    "notebook": "workbench.runs.job",
    "seed_demo": "workbench.versions.seed_job",
    "probe": "workbench.jobs.probe",  # counts seconds: proves that jobs run, survive and end here
}
RESUMABLE = frozenset({"finetune", "seed_demo"})  # started again after a crash; others end as interrupted
MAX_ATTEMPTS = 3


class JobState(str, Enum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"  # its process died or was stopped; what it had stored is kept

    @property
    def ended(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class Job:
    """A snapshot of one job. Times are UTC, ISO 8601."""

    id: str
    kind: str
    title: str
    spec: dict[str, Any]
    state: JobState
    fraction: float  # of the work, 0 to 1
    message: str  # what it is doing
    result: dict[str, Any] | None  # when it is done
    partial: dict[str, Any] | None  # what it has stored so far; kept whatever becomes of it
    error: dict[str, Any] | None  # code, message, value, limit, remedy, param of what ended it
    device: Device
    parent_id: str | None
    created_at: str
    started_at: str | None
    ended_at: str | None
    heartbeat_at: str | None
    pid: int | None
    attempts: int
    cancel_requested: bool
    log_path: str  # standard output and error of its process

    @property
    def ended(self) -> bool:
        return self.state.ended


class JobError(WorkbenchError):
    """A job cannot be submitted, found or run."""

    code = "job_error"


class UnknownJobKindError(JobError, LookupError):
    """No such kind of job, or its room is not installed."""

    code = "unknown_job_kind"


class JobSpecError(JobError, ValueError):
    """The spec is no JSON object, or a value of the job itself is out of range."""

    code = "invalid_job_spec"


class UnknownJobError(JobError, LookupError):
    """No job of that id in this HOME_DIR."""

    code = "job_not_found"


class JobStateError(JobError):
    """The job is not in a state for that: another process has it, or it has ended."""

    code = "job_state"


class JobTimeoutError(JobError, TimeoutError):
    """The job did not end in time; it goes on."""

    code = "job_timeout"


class JobCancelled(WorkbenchError):
    """Somebody asked the job to end."""

    code = "job_cancelled"


class JobInterrupted(BaseException):
    """The job's process was told to stop. Like KeyboardInterrupt, no `except Exception` on the way keeps it."""


class KindModule(Protocol):
    """What the module of a kind offers. One whose check reads HOME_DIR has ``check_in(spec, settings)`` beside it."""

    def check(self, spec: dict[str, Any]) -> None:
        """Raise a typed error for a spec that cannot run; cheap."""
        ...

    def run(self, spec: dict[str, Any], context: Any) -> dict[str, Any]:
        """Do the work; the result has JSON's types."""
        ...


def kind_module(kind: str) -> KindModule:
    """The module of `kind`. Raises UnknownJobKindError."""
    name = KINDS.get(kind)
    if name is None:
        raise UnknownJobKindError(
            f"there is no job kind {kind!r}", value=kind, limit=sorted(KINDS), param="kind",
            remedy=f"Kinds: {', '.join(sorted(KINDS))}.",
        )  # fmt: skip
    try:
        return cast(KindModule, importlib.import_module(name))
    except ModuleNotFoundError as error:
        raise UnknownJobKindError(
            f"jobs of kind {kind!r} cannot run here: {error}", value=kind, param="kind",
            remedy="Install the missing package.",
        ) from error  # fmt: skip


def error_facts(error: BaseException) -> dict[str, Any]:
    """An error as a job keeps it; a full disk is named as one, wherever it was met."""
    facts = {
        name: _plain(getattr(error, name, None)) for name in ("code", "value", "limit", "remedy", "param")
    }
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        facts |= {
            "code": "disk_full",
            "value": error.filename,
            "remedy": "Free space there and run it again.",
        }
    return {
        **facts,
        "code": facts["code"] or "unexpected_error",
        "type": type(error).__name__,
        "message": str(getattr(error, "message", None) or error or type(error).__name__),
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set | frozenset) and len(value) <= 100:
        return [_plain(item) for item in value]
    if isinstance(value, dict) and len(value) <= 100:
        return {str(name): _plain(item) for name, item in value.items()}
    return str(value)[:500]
