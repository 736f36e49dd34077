"""What a notebook's cells call: one job with its progress in the cell, and the nightly gate.

Boundary: a notebook's side of the services. It decides nothing that the jobs do not decide.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from workbench import settings as settings_module
from workbench.jobs.model import Device, Job, JobError, JobState
from workbench.jobs.table import Jobs
from workbench.store import open_store

NEWEST = "newest"
CHAMPION = "champion"
NOT_NEEDED = "not needed"  # the verdict when the champion is the candidate itself


class JobNotDoneError(JobError):
    """The job of this cell ended without a result."""

    code = "job_not_done"


def run_job(
    kind: str, spec: Mapping[str, Any], *, title: str = "", device: Device = "shared"
) -> dict[str, Any]:
    """Run a job to its end, in the running app of HOME_DIR or here, its progress printed; its result.

    Raises:
        JobNotDoneError: it failed or was cancelled; `value` is the error that it kept.
        and what the kind's check raises for the spec.
    """
    settings = settings_module.load()
    told = ""

    def show(fraction: float, message: str) -> None:
        nonlocal told
        if message != told:  # a cell's output is kept: a line a step, not one a token
            told = message
            print(f"{fraction:4.0%}  {message}", file=sys.stdout, flush=True)

    with open_store(settings.home_dir) as store:
        job = Jobs(store, settings.home_dir).run(kind, spec, title=title, device=device, on_progress=show)
    return _result(job)


def nightly_gate(
    *,
    model_name: str,
    candidate: str = NEWEST,
    dataset: str,
    rules: str | None = None,
    promote: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge a candidate against the champion, and promote it if it passes and `promote` says so; the gate's result.

    `candidate`: a version's number, ``@alias``, or "newest". When the champion itself is meant there is nothing to judge, and
    the verdict is "not needed".

    Raises:
        UnknownVersionError: no such candidate, or no champion.
        JobNotDoneError: the comparison failed.
    """
    from workbench.versions.registry import Registry

    registry = Registry(settings_module.load())
    champion = registry.get(model_name, f"@{CHAMPION}").ref.version
    number = (
        max(info.ref.version or 0 for info in registry.versions(model_name))
        if candidate == NEWEST
        else registry.get(model_name, candidate).ref.version
    )
    base = {"name": model_name, "champion": champion, "candidate": number, "promoted": False}
    if number == champion:
        return {
            **base,
            "verdict": NOT_NEEDED,
            "reasons": [],
            "metrics": {},
            "note": "The candidate is the champion.",
        }
    spec = {
        "name": model_name, "candidate": str(number), "dataset": dataset, "rules": rules, "promote": promote,
        "limit": limit, "seed": seed,
    }  # fmt: skip
    return {**base, **run_job("gate", spec, title=f"gate {model_name}/{number}", device="exclusive")}


def gate_record(result: Mapping[str, Any]) -> dict[str, Any]:
    """A gate's result as a flat record: verdict and versions, and each metric's figures as ``METRIC_diff`` and so on."""
    flat: dict[str, Any] = {
        name: result.get(name)
        for name in ("name", "champion", "candidate", "verdict", "promoted", "run_id", "note")
    }
    flat["reasons"] = [reason.get("text", "") for reason in result.get("reasons", ())]
    for metric, figures in result.get("metrics", {}).items():
        for part in ("a", "b", "diff", "low", "high", "n"):
            flat[f"{metric}_{part}"] = figures.get(part)
    return flat


def _result(job: Job) -> dict[str, Any]:
    if job.state is JobState.DONE and job.result is not None:
        return job.result
    remedy = (job.error or {}).get("remedy") or f"Its log: {job.log_path}"
    raise JobNotDoneError(
        f"{job.title} is {job.state.value}: {job.message}", value=job.error, remedy=remedy, param=job.kind
    )
