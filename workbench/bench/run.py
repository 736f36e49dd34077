"""run_benchmark: from a spec to a saved record: find the server, plan, warm up, load it, collect, save.

Command line, Job and notebook call this one function, so that their figures are the same for the same records.

Boundary: the order of things. Each step is in a module of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.backends.endpoints import is_endpoint
from workbench.bench import saved
from workbench.bench.assemble import assemble, notes_of
from workbench.bench.driver import ClientRecord, DriverResult, ShouldStop, drive
from workbench.bench.engine_side import EngineSide, step_figures, weight_bytes
from workbench.bench.errors import BenchmarkError
from workbench.bench.report import live_figures, request_table
from workbench.bench.saved import BenchmarkRecord
from workbench.bench.spec import BenchmarkSpec
from workbench.bench.target import Target, check_fits, endpoint_target, find_target, measure_words
from workbench.bench.workload import (
    Workload,
    from_dataset,
    from_trace,
    read_conversations,
    read_trace,
    synthetic,
)
from workbench.errors import WorkbenchError
from workbench.limits import measure
from workbench.run_state import RunningApp, RunState
from workbench.settings import Settings, data_dir

if TYPE_CHECKING:
    import pandas as pd

    from engine.limits import Limits
    from engine.records import EngineStats
    from workbench.backends.protocol import Backend

log = logging.getLogger(__name__)
_LIVE_INTERVAL_S = 1.0
_BEFORE, _LOADED = 0.08, 0.92  # of the work: what is before the load, and when it has ended


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a benchmark is. `figures` are those of the requests so far, while they run."""

    fraction: float
    message: str
    figures: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A finished benchmark: its record, and its table of requests."""

    record: BenchmarkRecord
    requests: pd.DataFrame


@dataclass(frozen=True, slots=True)
class Server:
    """Who is loaded. `backend` reads the engine's own records where it is ours and on this machine."""

    target: Target
    backend: Backend | None


OnProgress = Callable[[Progress], None]


def check(spec: BenchmarkSpec) -> None:
    """What can be known without a server: that files are there and make sense. Raises BenchmarkError."""
    if spec.dataset is not None:
        read_conversations(dataset_path(spec.dataset))
    if spec.trace is not None:
        read_trace(Path(spec.trace))


def run_benchmark(
    spec: BenchmarkSpec,
    settings: Settings,
    *,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
    track: bool = True,
) -> Benchmark:
    """Run it, save it under HOME_DIR, and log it to MLflow unless `track` is false or MLflow does not answer.

    Ended early (`should_stop`, Ctrl-C) it saves what there is, marked as cancelled. `on_progress` and `should_stop` are called
    in this thread.

    Raises:
        BenchmarkError: it cannot run as described; nothing was sent.
        ServerUnreachableError, UnknownModelError: of the server.
        BenchmarkNotSavedError: the disk refused the record.
    """
    tell = on_progress or (lambda progress: None)
    check(spec)
    tell(Progress(0.0, "Finding the server"))
    with _server(spec, settings, tell) as server:
        tell(Progress(0.04, "Planning the requests"))
        workload = plan(spec, server.target)
        check_fits(server.target, spec, workload)
        side = EngineSide(server.backend, server.target.model) if server.backend is not None else None
        stats = server.backend.stats(server.target.model) if server.backend is not None else None
        result = _load(spec, server.target, workload, side, tell, should_stop)
        tell(Progress(_LOADED, "Collecting the engine's records"))
        requests = request_table(result.records, result.began_ns)
        engine, notes = None, notes_of(spec, server.target, workload, has_records=server.backend is not None)
        if side is not None and stats is not None:
            requests, engine = _engine_figures(requests, side, stats, notes, settings.threads)
    record = assemble(spec, server.target, workload, result, requests, stats, engine, notes)
    saved.save(settings.home_dir, record, requests)
    if track:
        tell(Progress(0.97, "Logging to MLflow"))
        record = _track(settings, record, requests)
    tell(Progress(1.0, "Done", record.figures))
    return Benchmark(record, requests)


def plan(spec: BenchmarkSpec, target: Target) -> Workload:
    """All requests and their times. Asks the server about its tokens where lengths are synthetic."""
    if spec.dataset is not None:
        return from_dataset(spec, read_conversations(dataset_path(spec.dataset)))
    costs = measure_words(target)
    if spec.trace is not None:
        return from_trace(spec, costs, read_trace(Path(spec.trace)))
    return synthetic(spec, costs)


def dataset_path(name: str) -> Path:
    """A dataset's file: a path, or a name in ``data/datasets``. Raises BenchmarkError."""
    bundled = data_dir() / "datasets" / f"{name}.jsonl"
    path = bundled if "/" not in name and bundled.is_file() else Path(name)
    if not path.is_file():
        known = sorted(file.stem for file in (data_dir() / "datasets").glob("*.jsonl"))
        raise BenchmarkError(
            f"there is no dataset {name!r}", value=name, limit=known, param="dataset",
            remedy=f"Give a JSONL file, or one of: {', '.join(known) or 'none are bundled'}.",
        )  # fmt: skip
    return path


@contextmanager
def _server(spec: BenchmarkSpec, settings: Settings, tell: OnProgress) -> Iterator[Server]:
    if is_endpoint(spec.model):
        yield Server(endpoint_target(spec.model or "", settings), None)
        return
    app = RunState(settings.run_dir).read()
    if spec.url is not None and (app is None or not _is_at(app, spec.url)):
        yield Server(find_target(spec.url, spec.model), None)
    elif app is not None:
        with _of_app(app, spec) as server:
            yield server
    else:
        from workbench.bench.own_server import own_server

        tell(Progress(0.01, "Starting an engine"))
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        with own_server(settings):
            app = RunState(settings.run_dir).read()
            if app is None:
                raise BenchmarkError("the benchmark's own server did not tell its address", param="HOME_DIR")
            with _of_app(app, spec) as server:
                yield server


@contextmanager
def _of_app(app: RunningApp, spec: BenchmarkSpec) -> Iterator[Server]:
    """The running app's API, with a way to its engine's records; a model that is not resident is loaded for this run."""
    from workbench.backends.app import AppBackend

    with AppBackend(app) as backend:
        resident = backend.models()
        model = spec.model
        if model is not None and model not in resident:
            model = backend.load(model)
        try:
            yield Server(find_target(app.url, model or resident[0], app.token), backend)
        finally:
            if model is not None and model not in resident:
                backend.unload(model)


def _load(
    spec: BenchmarkSpec,
    target: Target,
    workload: Workload,
    side: EngineSide | None,
    tell: OnProgress,
    should_stop: ShouldStop | None,
) -> DriverResult:
    import pandas  # noqa: F401 - half a second, now rather than beside the load generator

    total, told_at = len(workload.measured), [0.0]

    def progressed(records: Sequence[ClientRecord]) -> None:
        if side is not None:
            side.collect_if_due()
        done, so_far = len(records), None
        if done and time.monotonic() - told_at[0] >= _LIVE_INTERVAL_S:
            told_at[0], so_far = time.monotonic(), live_figures(records)
        message = f"{done} of {total} requests" if done else "Warming up"
        tell(Progress(_BEFORE + (_LOADED - _BEFORE) * min(done / total, 0.999), message, so_far))

    if side is not None:
        side.begin()
    result = drive(target, spec, workload, on_progress=progressed, should_stop=should_stop)
    if side is not None:
        side.begin_at(result.began_ns)
        try:
            side.collect()
        except WorkbenchError as error:
            log.warning("the engine's records could not be read: %s", error)
    return result


def _engine_figures(
    requests: pd.DataFrame, side: EngineSide, stats: EngineStats, notes: list[str], threads: int | None
) -> tuple[pd.DataFrame, dict[str, Any] | None]:
    steps = side.steps
    limits: Limits | None = None
    if weight_bytes(steps):
        try:
            from engine.device_choice import available_cores  # imports torch: not before the load has ended

            cores = threads or available_cores()  # as the engine decides
            limits = measure(stats.device or "cpu", stats.dtype, weight_bytes(steps), threads=cores)
        except (RuntimeError, ImportError) as error:
            notes.append(f"The machine's limits could not be measured: {str(error).splitlines()[0]}")
    return side.add_columns(requests), step_figures(steps, limits)


def _track(settings: Settings, record: BenchmarkRecord, requests: pd.DataFrame) -> BenchmarkRecord:
    """Log to MLflow; a benchmark is not lost because MLflow is away."""
    from workbench.bench.track import log_benchmark

    try:
        tracked = record.model_copy(update={"mlflow": log_benchmark(settings, record, requests)})
    except Exception as error:  # noqa: BLE001 - MLflow raises its own, HTTP's, the database's; the record says what came
        log.warning("the benchmark was not logged to MLflow: %s", error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        tracked = record.model_copy(update={"notes": [*record.notes, f"Not logged to MLflow: {reason}"]})
    saved.update(settings.home_dir, tracked)
    return tracked


def _is_at(app: RunningApp, url: str) -> bool:
    return url.rstrip("/").removesuffix("/v1") == app.url.rstrip("/")
