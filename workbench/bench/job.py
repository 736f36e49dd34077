"""The Job of kind "benchmark": a page, the API or a schedule submits a spec; this runs it in the job's process.

While it runs, `partial` holds the figures so far. Cancelled, it has saved what there was, and its partial result is the whole
result of the requests that ended.

Boundary: between a Job and `run_benchmark`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.bench import spec as spec_module

if TYPE_CHECKING:
    from workbench.bench.run import Benchmark, Progress
    from workbench.jobs import JobContext

_PARTIAL_INTERVAL_S = 1.0


def check(spec: Mapping[str, Any]) -> None:
    """Refuse what cannot run, before it is queued. Raises BenchmarkError."""
    from workbench.bench import run as runner

    runner.check(spec_module.parse(spec))


def run(spec: Mapping[str, Any], context: JobContext) -> dict[str, Any]:
    """Run the benchmark; its result. Raises JobCancelled after what there was is saved."""
    from workbench.bench.run import run_benchmark

    told_at = 0.0

    def tell(progress: Progress) -> None:
        nonlocal told_at
        context.report(progress.fraction, progress.message)
        if progress.figures is not None and time.monotonic() - told_at >= _PARTIAL_INTERVAL_S:
            told_at = time.monotonic()
            context.partial({"figures": progress.figures})

    finished = run_benchmark(
        spec_module.parse(spec), context.settings, on_progress=tell, should_stop=lambda: context.cancelled
    )
    result = result_of(finished)
    context.partial(result)
    context.check_cancelled()
    return result


def result_of(finished: Benchmark) -> dict[str, Any]:
    """What is told of a finished benchmark: its figures at the top, where it is kept, and what it depends on."""
    record = finished.record
    limit = (record.engine or {}).get("limit") or {}
    return {
        "id": record.id,
        "at": record.at,
        "title": record.title,
        **record.figures,
        "share_of_limit": limit.get("share_of_limit"),
        "engine": record.engine,
        "agreement": record.agreement,
        "offered_rps": record.offered_rps,
        "cancelled": record.cancelled,
        "plan_digest": record.plan_digest,
        "target": record.target,
        "spec": record.spec.as_dict(),
        "notes": record.notes,
        "mlflow": record.mlflow,
        "machine": record.machine,
        "versions": record.versions,
        "commit": record.commit,
    }
