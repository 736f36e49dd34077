"""Traces of the logged requests, sent over OTLP/HTTP: to the collector that the environment names, and to MLflow.

A destination has a bounded queue and a thread of its own, so that neither the engine, nor the event loop, nor the request log waits
for it. One that does not answer is told of once; what it missed is tried again for a minute, then dropped and counted.

Rows come from the request log's writer, twice where a text came after its record: a row without text waits for it a moment.

Boundary: when and where. What a span says is `trace_spans`'; headers, compression and certificates are the exporter's, which reads
OTEL_EXPORTER_OTLP_* itself.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan

    from workbench.settings import Settings

log = logging.getLogger(__name__)

MAX_QUEUED = 2_048  # rows of one destination
_BATCH_ROWS = 100
_BATCH_S = 1.0  # the longest that a row waits for others
_TEXT_S = 2.0  # that a row waits for its text
_RETRY_S = 5.0
_GIVE_UP_S = 60.0
_EXPORT_S = (
    10.0  # of one request with the exporter's own attempts; MLflow's store takes seconds on a busy machine
)
_CLOSE_S = 2.0
MLFLOW_EXPERIMENT = "quire/requests"
Row = dict[str, Any]


class Exporter(Protocol):
    """As OpenTelemetry's SpanExporter, whose result says by its name whether the spans arrived."""

    def export(self, spans: Sequence[ReadableSpan]) -> Any: ...

    def shutdown(self) -> None: ...


class Destination:
    """Sends rows as spans. Thread-safe."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], Exporter],
        spans_of: Callable[[Row], Sequence[ReadableSpan]],
        *,
        waits_for_text: bool,
    ) -> None:
        """`connect`: makes the exporter, in the thread, again after a failure; `spans_of`: empty for a row that is not sampled."""
        self.name = name
        self.num_sent = 0  # requests
        self.num_dropped = 0
        self._connect = connect
        self._spans_of = spans_of
        self._waits_for_text = waits_for_text
        self._queue: SimpleQueue[Row | None] = SimpleQueue()
        self._textless: OrderedDict[str, tuple[float, Row]] = OrderedDict()  # with when to send them anyway
        self._ready: list[Row] = []
        self._exporter: Exporter | None = None
        self._failing_since: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"quire-traces-{name}", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        """Queue a row, or count it as lost. Never blocks."""
        if self._queue.qsize() < MAX_QUEUED:
            self._queue.put(row)
        else:
            self.num_dropped += 1

    def close(self) -> None:
        """Send what is queued, for at most `_CLOSE_S`."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(_CLOSE_S)
        if self._exporter is not None:
            self._exporter.shutdown()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._collect()
            now = time.monotonic()
            for key in [key for key, (due, _) in self._textless.items() if due <= now or is_last]:
                self._ready.append(self._textless.pop(key)[1])
            while self._ready and self._send(self._ready[:_BATCH_ROWS]):
                del self._ready[:_BATCH_ROWS]
            if self._ready and not is_last and self._closing.wait(_RETRY_S):
                return

    def _collect(self) -> bool:
        """Take what comes until a batch is full or old; True at the end."""
        until: float | None = None
        while len(self._ready) < _BATCH_ROWS:
            waiting = bool(self._ready or self._textless)
            if waiting and until is None:
                until = time.monotonic() + _BATCH_S
            try:
                row = self._queue.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except Empty:
                return False
            if row is None:
                return True
            if self._waits_for_text and row.get("prompt") is None and row.get("output") is None:
                self._textless[row["row"]] = time.monotonic() + _TEXT_S, row
                if len(self._textless) > MAX_QUEUED:
                    self._ready.append(self._textless.popitem(last=False)[1][1])
            else:
                self._textless.pop(row["row"], None)
                self._ready.append(row)
        return False

    def _send(self, rows: list[Row]) -> bool:
        """Whether these rows are done with: sent, or given up."""
        try:
            spans = [span for row in rows for span in self._spans_of(row)]
            if spans:
                self._exporter = self._exporter or self._connect()
                if self._exporter.export(spans).name != "SUCCESS":
                    raise ConnectionError("it takes no spans")
        except Exception as error:  # noqa: BLE001 - the thread's boundary: whatever a collector does ends no thread
            return self._failed(error, len(rows))
        if self._failing_since is not None:
            log.warning("traces reach %s again", self.name)
            self._failing_since = None
        self.num_sent += len(rows)
        return True

    def _failed(self, error: Exception, num_rows: int) -> bool:
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            log.warning("traces do not reach %s, they are tried again for a while: %s", self.name, error)
        if now - self._failing_since < _GIVE_UP_S:
            return False
        self.num_dropped += num_rows
        return True


def trace_maker(settings: Settings) -> Callable[[str], bool]:
    """Makes the MLflow trace of a logged request that was not sampled; whether the log had it.

    Raises, when called: ConnectionError, or httpx.HTTPError: MLflow does not take it.
    """

    def make(request_id: str) -> bool:
        from workbench.observe.request_reader import rows_of

        rows = rows_of(settings.home_dir, request_id)
        if not rows:
            return False
        spans_for = _mlflow_spans(settings)
        exporter = mlflow_exporter(settings.mlflow_url)
        try:
            if exporter.export([span for row in rows for span in spans_for(row)]).name != "SUCCESS":
                raise ConnectionError(f"MLflow takes no trace of {request_id}")
        finally:
            exporter.shutdown()
        return True

    return make


def _mlflow_spans(settings: Settings) -> Callable[[Row], Sequence[ReadableSpan]]:
    """A row as a trace that MLflow finds by the request's id."""
    from workbench.observe.trace_spans import spans_of

    resource, server = _resource(), _server(settings)
    return lambda row: tuple(
        spans_of(row, resource, {**server, "mlflow.traceTag.request_id": row["request_id"]})
    )


def _resource() -> Resource:
    from opentelemetry.sdk.resources import Resource

    from workbench.build_info import build_info

    name = os.environ.get("OTEL_SERVICE_NAME", "quire")  # the SDK would take it for less than our default
    return Resource.create({"service.name": name, "service.version": build_info()["version"]})


def _server(settings: Settings) -> dict[str, Any]:
    return {"server.address": settings.host, "server.port": settings.port}


def destinations(settings: Settings) -> list[Destination]:
    """Where traces go by the settings; nothing is imported where they go nowhere.

    The collector gets each request in its caller's trace, if there is one and it is sampled there; MLflow gets it as a trace of its
    own, which is found by the request's id.
    """
    share, waits_for_text = settings.trace_sample, settings.request_text != "off"
    endpoint, mlflow_url = settings.otlp_endpoint, settings.mlflow_url
    if not endpoint and not share:
        return []
    from workbench.observe.trace_spans import is_sampled, parent_of, spans_of, trace_id_of

    for noisy in ("opentelemetry.exporter.otlp", "opentelemetry.exporter.http"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # a dead collector is said once, by us
    resource, server, spans_for_mlflow = _resource(), _server(settings), _mlflow_spans(settings)

    def for_collector(row: Row) -> Sequence[ReadableSpan]:
        parent = parent_of(row.get("traceparent"))
        if parent is not None:
            return tuple(spans_of(row, resource, server, parent)) if parent.trace_flags.sampled else ()
        wanted = share is None or is_sampled(trace_id_of(row["request_id"]), share)
        return tuple(spans_of(row, resource, server)) if wanted else ()

    def for_mlflow(row: Row) -> Sequence[ReadableSpan]:
        wanted = is_sampled(trace_id_of(row["request_id"]), share or 0.0)
        return spans_for_mlflow(row) if wanted else ()

    found = []
    if endpoint:
        url = f"{endpoint.rstrip('/')}/v1/traces"
        found.append(
            Destination(_shown(url), lambda: otlp_exporter(url), for_collector, waits_for_text=waits_for_text)
        )
    if share and mlflow_url.startswith("http"):
        found.append(
            Destination("MLflow", lambda: mlflow_exporter(mlflow_url), for_mlflow, waits_for_text=waits_for_text)
        )  # fmt: skip
    elif share:
        log.warning("traces do not go to MLflow: %s is no server", mlflow_url)
    return found


def otlp_exporter(url: str, headers: dict[str, str] | None = None) -> Exporter:
    """OpenTelemetry's exporter; without `headers` it takes those of OTEL_EXPORTER_OTLP_HEADERS."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    made: Exporter = OTLPSpanExporter(endpoint=url, headers=headers, timeout=_EXPORT_S)
    return made


def mlflow_exporter(mlflow_url: str) -> Exporter:
    """An exporter to MLflow's own OTLP route. The experiment is made over HTTP: MLflow's client takes seconds to import.

    Raises:
        httpx.HTTPError: MLflow does not answer.
    """
    import httpx

    api = f"{mlflow_url}/api/2.0/mlflow/experiments"
    with httpx.Client(timeout=_EXPORT_S) as http:
        found = http.get(f"{api}/get-by-name", params={"experiment_name": MLFLOW_EXPERIMENT})
        if found.status_code == 404:
            http.post(f"{api}/create", json={"name": MLFLOW_EXPERIMENT})  # or another process was first
            found = http.get(f"{api}/get-by-name", params={"experiment_name": MLFLOW_EXPERIMENT})
        found.raise_for_status()
    experiment_id = str(found.json()["experiment"]["experiment_id"])
    return otlp_exporter(f"{mlflow_url}/v1/traces", {"x-mlflow-experiment-id": experiment_id})


def _shown(url: str) -> str:
    """An address without what may be a secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or ''}{parts.path}"
