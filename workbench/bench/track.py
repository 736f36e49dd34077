"""A benchmark as an MLflow run: parameters, metrics in one call, the table of requests, the whole record.

Metric names are the same for every benchmark (``ttft_ms/p95``), so that runs ticked in MLflow's pages share their charts.

Boundary: what is logged and how it is called. The store is `workbench.tracking`'s.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from workbench import tracking

if TYPE_CHECKING:
    import pandas as pd

    from workbench.bench.saved import BenchmarkRecord
    from workbench.settings import Settings

_RATES = (
    "num_requests", "num_ok", "num_failed", "duration_s", "requests_per_s", "input_tokens_per_s", "output_tokens_per_s",
)  # fmt: skip
_GROUPS = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "input_tokens", "output_tokens")
_MAX_TABLE_ROWS = 20_000  # MLflow's pages read the table whole


def log_benchmark(settings: Settings, record: BenchmarkRecord, requests: pd.DataFrame) -> dict[str, str]:
    """Make the run; its id and the path of its page.

    Raises:
        RegistryUnreachableError: MLflow does not answer.
    """
    run = tracking.start_run(settings, "benchmark", record.title, params=params(record), tags=tags(record))
    try:
        run.log_metrics(metrics(record))
        run.log_table("requests.json", table(requests))
        run.log_dict(record.model_dump(mode="json", exclude={"loop_lag_ms", "mlflow"}), "benchmark.json")
    except BaseException:
        run.end("FAILED")
        raise
    run.end("KILLED" if record.cancelled else "FINISHED")
    return {"run_id": run.id, "path": run.path}


def params(record: BenchmarkRecord) -> dict[str, Any]:
    """The resolved configuration, flat."""
    spec = {key: value for key, value in record.spec.as_dict().items() if key not in ("slo", "url", "model")}
    slo = {f"slo_{key}": value for key, value in record.spec.slo.model_dump().items()}
    target = {f"target_{key}": value for key, value in record.target.items()}
    both = {**spec, **slo, **target, "concurrency": record.spec.closed_loop, "warmup": record.spec.num_warmup}
    return {key: value for key, value in both.items() if value is not None}


def tags(record: BenchmarkRecord) -> dict[str, str]:
    """What runs are searched by, and where they ran."""
    found = {
        "quire.benchmark_id": record.id,
        "quire.plan_digest": record.plan_digest,
        "quire.model": record.target.get("model"),
        "quire.version_digest": record.target.get("version_digest"),
        "quire.commit": record.commit.get("revision"),
        "quire.commit_dirty": record.commit.get("dirty"),
        "quire.cpu": record.machine.get("cpu"),
        "quire.cores": record.machine.get("cores"),
        "quire.accelerators": ", ".join(record.machine.get("accelerators") or ()),
        **{f"quire.version.{name}": version for name, version in record.versions.items()},
    }
    return {key: str(value) for key, value in found.items() if value not in (None, "")}


def metrics(record: BenchmarkRecord) -> dict[str, float]:
    """All figures that are numbers, under names that every benchmark shares."""
    found = record.figures
    flat: dict[str, Any] = {name: found.get(name) for name in _RATES}
    for group in _GROUPS:
        flat |= {f"{group}/{key}": value for key, value in found[group].items()}
    if found["goodput"]:
        flat |= {f"goodput/{key}": found["goodput"][key] for key in ("share", "requests_per_s")}
    flat |= {f"generator/lateness_ms_{key}": v for key, v in found["generator"]["lateness_ms"].items()}
    engine = record.engine or {}
    flat |= {f"engine/{key}": engine.get(key) for key in ("num_steps", "busy_share", "decode_batch_mean")}
    limit = engine.get("limit") or {}
    flat |= {f"engine/{key}": limit.get(key) for key in ("share_of_limit", "share_of_limit_busy")}
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        flat[f"agreement/{name}_p95"] = ((record.agreement or {}).get(name) or {}).get("p95")
    return {key: float(value) for key, value in flat.items() if _is_number(value)}


def table(requests: pd.DataFrame) -> pd.DataFrame:
    """The table of requests as MLflow shows it: one value a cell."""
    return requests.drop(columns=["itl_ms"]).head(_MAX_TABLE_ROWS)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
