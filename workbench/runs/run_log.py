"""A notebook's run in MLflow: its parameters, the numbers of its record, the record and the executed notebook.

Boundary: what is logged. How MLflow is reached is ``workbench.tracking``'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.runs.notebooks import Notebook
from workbench.runs.record import Record

if TYPE_CHECKING:
    from workbench.jobs.context import JobContext
    from workbench.runs.parameters import Scalar

EXPERIMENT = "runs"


def check_reachable(context: JobContext) -> None:
    """Raise before the notebook runs if its record could not be kept. Where MLflow answers, this imports nothing.

    Raises:
        RegistryUnreachableError: MLflow does not answer.
    """
    from workbench import tracking

    uri = tracking.tracking_uri(context.settings)
    if uri.startswith("http") and not tracking.answers(uri):
        tracking.experiment(
            context.settings, EXPERIMENT
        )  # asked in earnest: some servers have no health page


def log_run(
    context: JobContext,
    notebook: Notebook,
    values: dict[str, Scalar],
    executed: Path,
    record: Record | None,
    seconds: float,
    *,
    failed: bool,
) -> str:
    """Log one run; its MLflow id. Raises RegistryUnreachableError; the executed notebook stays in the job's folder."""
    from workbench import tracking

    tags: dict[str, Any] = {
        "quire.kind": "notebook",
        "quire.notebook": notebook.name,
        "quire.job": context.job_id,
    }
    if record is not None:
        tags["quire.record"] = record.kind
    run = tracking.start_run(
        context.settings, EXPERIMENT, context.title or notebook.name, params=values, tags=tags
    )
    status = "FAILED"
    try:
        run.log_metrics({"duration_s": seconds, **(record.metrics() if record is not None else {})})
        if record is not None:
            run.log_dict(
                {"kind": record.kind, "values": record.values, "created_at": record.created_at}, "record.json"
            )
        run.log_artifact(executed)
        status = "FAILED" if failed else "FINISHED"
    finally:
        run.end(status)
    return run.id
