"""Saved benchmarks: one folder each under ``HOME_DIR/benchmarks``, with the record as JSON and the requests as Parquet.

A folder is written aside and renamed when it is complete: there are no half benchmarks. MLflow gets the same for comparison
in its own pages; what is here can be listed and compared without a server.

Boundary: disk. What the figures mean is `report`'s.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from workbench.bench.errors import BenchmarkNotFoundError, BenchmarkNotSavedError
from workbench.bench.spec import BenchmarkSpec

if TYPE_CHECKING:
    import pandas as pd

_RECORD, _REQUESTS = "benchmark.json", "requests.parquet"


class BenchmarkRecord(BaseModel):
    """All that is kept of one benchmark but its table of requests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    id: str
    at: str  # UTC, ISO 8601
    title: str
    spec: BenchmarkSpec  # as it was resolved
    cancelled: bool
    target: dict[str, Any]  # url, model, and of an engine of ours: digest, dtype, device, limits
    plan_digest: str  # equal for the same requests by the same plan
    offered_rps: float | None
    forced_length: bool
    figures: dict[str, Any]  # `report.figures`
    loop_lag_ms: list[float]
    engine: (
        dict[str, Any] | None
    )  # `engine_side.step_figures`; None for a server whose records cannot be read
    agreement: dict[str, Any] | None  # the client's figures against the engine's
    notes: list[str]  # what a reader of the figures must know
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: dict[str, Any]
    mlflow: dict[str, str] | None = None  # run_id and path; None: not logged


def new_id() -> str:
    """An id that sorts by time."""
    now = datetime.now(UTC)
    return f"bench-{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03d}-{uuid.uuid4().hex[:4]}"


def folder_of(home_dir: Path) -> Path:
    return home_dir / "benchmarks"


def save(home_dir: Path, record: BenchmarkRecord, requests: pd.DataFrame) -> Path:
    """Write both, all or nothing; the folder. Raises BenchmarkNotSavedError."""
    parent = folder_of(home_dir)
    with _typed(parent):
        parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=parent, prefix=".writing-"))
        try:
            requests.to_parquet(aside / _REQUESTS, index=False)
            (aside / _RECORD).write_text(record.model_dump_json(indent=1) + "\n", "utf-8")
            for file in aside.iterdir():
                _sync(file)
            target = parent / record.id
            os.replace(aside, target)
            _sync(parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return target


def update(home_dir: Path, record: BenchmarkRecord) -> None:
    """Replace the record of a saved benchmark. Raises BenchmarkNotSavedError; the old record stays then."""
    folder = folder_of(home_dir) / record.id
    aside = folder / f".{_RECORD}.{os.getpid()}"
    with _typed(folder):
        try:
            aside.write_text(record.model_dump_json(indent=1) + "\n", "utf-8")
            _sync(aside)
            os.replace(aside, folder / _RECORD)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def listed(home_dir: Path, *, limit: int | None = None) -> list[BenchmarkRecord]:
    """Saved benchmarks, newest first. One that cannot be read is left out."""
    found: list[BenchmarkRecord] = []
    for file in sorted(folder_of(home_dir).glob(f"bench-*/{_RECORD}"), reverse=True):
        if limit is not None and len(found) >= limit:
            break
        try:
            found.append(BenchmarkRecord.model_validate_json(file.read_text("utf-8")))
        except (OSError, ValidationError):
            continue
    return found


def load(home_dir: Path, benchmark_id: str) -> tuple[BenchmarkRecord, pd.DataFrame]:
    """A saved benchmark: by its id, an unambiguous beginning of it, its MLflow run id, or "latest".

    Raises:
        BenchmarkNotFoundError: none is meant, or more than one.
    """
    import pandas as pd

    known = listed(home_dir)
    matching = [
        record
        for record in known
        if (benchmark_id and record.id.startswith(benchmark_id))
        or (record.mlflow or {}).get("run_id") == benchmark_id
    ]
    if benchmark_id == "latest":
        matching = known[:1]
    exact = [record for record in matching if record.id == benchmark_id]
    matching = exact or matching
    if len(matching) != 1:
        raise BenchmarkNotFoundError(
            f"{'no' if not matching else len(matching)} saved benchmarks match {benchmark_id!r}", value=benchmark_id,
            limit=[record.id for record in (matching or known)[:10]], param="benchmark",
            remedy="See `quire bench list`.",
        )  # fmt: skip
    record = matching[0]
    return record, pd.read_parquet(folder_of(home_dir) / record.id / _REQUESTS)


@contextmanager
def _typed(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BenchmarkNotSavedError(
            f"the benchmark cannot be saved in {str(folder)!r}: {error.strerror or error}", value=str(folder),
            param="HOME_DIR", remedy="Free space there, or use another HOME_DIR; nothing half-written was left.",
        ) from error  # fmt: skip


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
