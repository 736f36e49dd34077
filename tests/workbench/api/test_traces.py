"""Traces over OTLP/HTTP: what a collector gets is what the caller was told, in the caller's trace, with as much text as is allowed."""

from __future__ import annotations

import gzip
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401 - here, not in a thread that a test leaves behind
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from workbench.host import fake_worker
from workbench.observe import request_reader, trace_export
from workbench.observe.trace_spans import is_sampled, parent_of, trace_id_of
from workbench.ports import bind
from workbench.services import Services
from workbench.settings import Settings

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """An OTLP receiver: decodes what it is sent with OpenTelemetry's own protocol."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self.num_requests = 0

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        self.num_requests += 1
        for group in request.resource_spans:
            self.resources.append(attributes(group.resource))
            self.spans += [span for scope in group.scope_spans for span in scope.spans]

    def roots(self) -> dict[str, Any]:
        """The spans of requests, by request id."""
        told = [span for span in self.spans if "gen_ai.operation.name" in attributes(span)]
        return {attributes(span)["gen_ai.response.id"]: span for span in told}


def attributes(of: Any) -> dict[str, Any]:
    found = {}
    for each in of.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/x-protobuf"
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.take(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield collector, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def services_of(home: Path, endpoint: str, **settings: Any) -> Services:
    return Services(
        Settings(home_dir=home, fake=True, demo=False, follow="", otlp_endpoint=endpoint, **settings)
    )


@pytest.mark.parametrize("text", ["off", "redacted"])
def test_a_request_is_a_trace_with_the_engines_own_times(serve: Any, tmp_path: Path, text: Any) -> None:
    with collecting() as (collector, url):
        services = services_of(tmp_path, url, request_text=text)
        before_ns = time.time_ns()
        with serve(partial(fake_worker, delay_s=0.002), services=services) as server:
            ask = [{"role": "user", "content": "write to ada@example.org"}]
            headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "mine", "x-session-id": "s"}
            body = {"messages": ask, "max_tokens": 5, "user": "ada"}
            answer = server.http.post("/v1/chat/completions", json=body, headers=headers).json()
            server.http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2}, headers={"x-request-id": "other"})  # fmt: skip
        after_ns = time.time_ns()
    roots = collector.roots()
    assert set(roots) == {"mine", "other"}
    root = roots["mine"]
    told = attributes(root)
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, SPAN)
    assert roots["other"].trace_id == trace_id_of("other").to_bytes(16, "big")
    assert root.name == "chat fake-echo"
    assert attributes(roots["other"])["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"] == 5
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert (told["user.id"], told["gen_ai.conversation.id"], told["server.port"]) == ("ada", "s", 8501)
    assert collector.resources[0]["service.name"] == "quire"
    if text == "off":
        assert not {name for name in told if "messages" in name}
    else:
        [message] = json.loads(told["gen_ai.input.messages"])
        assert message == {"role": "user", "parts": [{"type": "text", "content": "write to [email]"}]}
        [reply] = json.loads(told["gen_ai.output.messages"])
        assert reply["parts"][0]["content"] == answer["choices"][0]["message"]["content"]
    phases = {span.name: span for span in collector.spans if span.parent_span_id == root.span_id}
    assert set(phases) == {"queue", "prefill", "decode"}
    edges = [root.start_time_unix_nano]
    for name in ("queue", "prefill", "decode"):
        assert phases[name].start_time_unix_nano == edges[-1]
        edges.append(phases[name].end_time_unix_nano)
    assert edges[-1] == root.end_time_unix_nano
    assert before_ns <= edges[0] <= edges[1] < edges[2] < edges[3] <= after_ns
    [row] = [r for r in request_reader.read(tmp_path).to_pylist() if r["request_id"] == "mine"]
    assert (edges[2] - edges[0]) / 1e6 == pytest.approx(row["ttft_ms"], abs=1e-6)  # both of one subtraction


def test_a_caller_that_does_not_sample_is_not_traced_and_shares_are_kept(serve: Any, tmp_path: Path) -> None:
    ids = [f"request-{number}" for number in range(12)]
    with collecting() as (collector, url):
        services = services_of(tmp_path, url, trace_sample=0.5)
        services.settings = services.settings.model_copy(update={"mlflow_tracking_uri": "sqlite:///none"})
        with serve(partial(fake_worker, delay_s=0.0), services=services) as server:
            for request_id in ids:
                server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers={"x-request-id": request_id})  # fmt: skip
            for name, flag in (("kept", "01"), ("left", "00"), ("broken", "0x")):
                headers = {"traceparent": f"00-{TRACE}-{SPAN}-{flag}", "x-request-id": name}
                server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers)
    expected = {request_id for request_id in ids if is_sampled(trace_id_of(request_id), 0.5)}
    assert 0 < len(expected) < len(ids)
    assert set(collector.roots()) - {"broken"} == {*expected, "kept"}


@pytest.mark.parametrize(
    "given", [None, "", "00", f"01-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
              f"00-{TRACE.upper()}-{SPAN}-01", "x" * 10_000],
)  # fmt: skip
def test_what_is_no_trace_context_is_none(given: str | None) -> None:
    assert parent_of(given) is None


def test_a_dead_collector_is_said_once_and_costs_no_request(
    serve: Any, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(trace_export, "MAX_QUEUED", 5)
    monkeypatch.setattr(trace_export, "_BATCH_S", 0.01)
    monkeypatch.setattr(trace_export, "_CLOSE_S", 0.2)
    with bind("127.0.0.1", 0) as closed:
        port = closed.getsockname()[1]
    services = services_of(tmp_path, f"http://127.0.0.1:{port}")
    with caplog.at_level(logging.INFO), serve(partial(fake_worker, delay_s=0.0), services=services) as server:
        for _ in range(20):
            assert server.post("/v1/completions", prompt="x", max_tokens=1).status_code == 200
        metrics = server.http.get("/metrics").text
    told = [
        record
        for record in caplog.records
        if "traces" in record.getMessage() or "opentelemetry" in record.name
    ]
    assert len(told) == 1, [record.getMessage() for record in told]
    assert services.traces[0].num_sent == 0
    assert services.traces[0].num_dropped > 0
    assert "quire:traces_dropped_total" in metrics
    assert len(request_reader.read(tmp_path).to_pylist()) == 20


def test_what_a_collector_missed_reaches_it_when_it_is_back(monkeypatch: Any) -> None:
    class Down:
        name = "FAILURE"

    class Up:
        name = "SUCCESS"

    class Exporter:
        def __init__(self) -> None:
            self.answers = [Down(), Down()]
            self.taken: list[Any] = []

        def export(self, spans: Any) -> Any:
            if self.answers:
                return self.answers.pop()
            self.taken += spans
            return Up()

        def shutdown(self) -> None:
            pass

    monkeypatch.setattr(trace_export, "_RETRY_S", 0.01)
    monkeypatch.setattr(trace_export, "_BATCH_S", 0.01)
    exporter = Exporter()
    destination = trace_export.Destination(
        "it", lambda: exporter, lambda row: [row["row"]], waits_for_text=False
    )
    for number in range(250):
        destination.put({"row": number})
    deadline = time.monotonic() + 10
    while destination.num_sent < 250 and time.monotonic() < deadline:
        time.sleep(0.01)
    destination.close()
    assert exporter.taken == list(range(250))
    assert destination.num_dropped == 0
