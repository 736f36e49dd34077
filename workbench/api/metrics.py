"""Prometheus metrics of the engine, under vLLM's names with the prefix ``quire:``.

Histograms are filled by a sink on the engine thread, a handful of additions a step and a vectorised one a finished request;
gauges and counters are read from the engine's statistics when somebody scrapes. Metrics keep their own registry.

``model_name`` is a resident's id, which for a registered version is NAME/VERSION; ``workbench.api.info_metrics`` tells what it is.
Counters and histograms of a version that was unloaded stay for KEPT_S, so that its last minutes are scraped, and then go.

What counts requests is told by model, an adapter being one. What counts steps, tokens and blocks is told by engine, under the
name of the model that it was loaded for: an adapter's are its base's.

Source of names: vLLM's metrics design page (docs.vllm.ai, "Metrics").
"""

from __future__ import annotations

import copy
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.records import EngineEvent, RequestRecord, StepRecord
from engine.request import FinishReason
from workbench.api.http_metrics import HttpMetrics
from workbench.host import ModelCard

if TYPE_CHECKING:
    from engine.worker import EngineWorker

PREFIX = "quire:"
KEPT_S = 300.0  # of what an unloaded version counted
_LABEL = ("model_name",)
_PRIORITIES = (
    "high",
    "default",
    "low",
)  # below, at and above 0: a label of the number itself would be the clients' to make
_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_TOKEN_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
)
_REQUEST_SECONDS = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    60.0,
    120.0,
    480.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Histogram:
    """Bucket counts and sum. One writer (the engine thread); a reader may be one observation behind."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def observe_many(self, values: np.ndarray) -> None:
        if not values.size:
            return
        buckets = np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._counts))
        for bucket in np.nonzero(buckets)[0]:
            self._counts[bucket] += int(buckets[bucket])
        self._sum += float(values.sum())

    def family(
        self, name: str, text: str, model: str, more: dict[str, str] | None = None
    ) -> HistogramMetricFamily:
        """Cumulative buckets, as Prometheus wants them. `more`: further labels."""
        counts, total, rows = list(self._counts), 0, []
        for bound, count in zip((*self._bounds, None), counts):
            total += count
            rows.append(("+Inf" if bound is None else repr(float(bound)), total))
        labels = {"model_name": model, **(more or {})}
        family = HistogramMetricFamily(PREFIX + name, text, labels=tuple(labels))
        family.add_metric(list(labels.values()), rows, self._sum)
        return family


class EngineSink:
    """Accumulates the records of one model, of requests that carry its adapter or none. Runs on the engine thread."""

    def __init__(self, lora: str | None = None) -> None:
        self.lora = lora
        self.finished = dict.fromkeys(FinishReason, 0)
        self.ttft = Histogram(_SECONDS)
        self.itl = Histogram(_TOKEN_SECONDS)
        self.tpot = Histogram(_TOKEN_SECONDS)
        self.e2e = Histogram(_REQUEST_SECONDS)
        self.queue = Histogram(_REQUEST_SECONDS)
        self.queue_by_priority = {name: Histogram(_REQUEST_SECONDS) for name in _PRIORITIES}
        self.inference = Histogram(_REQUEST_SECONDS)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        self.grammar_compile = Histogram(_SECONDS)
        self.step_tokens = Histogram(_STEP_TOKENS)
        self.step_seconds = Histogram(_TOKEN_SECONDS)

    def on_step(self, record: StepRecord) -> None:
        self.step_tokens.observe(record.num_prefill_tokens + record.num_decode_tokens)
        self.step_seconds.observe((record.ended_ns - record.started_ns) / 1e9)

    def on_request(self, record: RequestRecord) -> None:
        if record.lora != self.lora:
            return
        self.finished[record.finish_reason] += 1
        self.e2e.observe((record.finished_ns - record.arrival_ns) / 1e9)
        self.prompt_tokens.observe(record.num_prompt_tokens)
        self.generation_tokens.observe(record.num_output_tokens)
        if record.grammar_compile_ms:
            self.grammar_compile.observe(record.grammar_compile_ms / 1e3)
        if record.admitted_ns is not None:
            waited_s = (record.admitted_ns - record.arrival_ns) / 1e9
            self.queue.observe(waited_s)
            level = _PRIORITIES[(record.priority > 0) - (record.priority < 0) + 1]
            self.queue_by_priority[level].observe(waited_s)
            self.inference.observe((record.finished_ns - record.admitted_ns) / 1e9)
        if record.first_token_ns is not None:
            self.ttft.observe((record.first_token_ns - record.arrival_ns) / 1e9)
        if len(record.token_ns) > 1:
            times = np.asarray(record.token_ns, dtype=np.int64)
            self.itl.observe_many(np.diff(times) / 1e9)
            self.tpot.observe(float(times[-1] - times[0]) / 1e9 / (len(times) - 1))

    def on_event(self, event: EngineEvent) -> None:
        """Nothing to count: failed steps are in the engine's statistics."""

    def families(self, model: str) -> Iterator[Metric]:
        for name, histogram, text in (
            ("time_to_first_token_seconds", self.ttft, "Arrival to first token"),
            ("inter_token_latency_seconds", self.itl, "Time between two tokens of a request"),
            (
                "request_time_per_output_token_seconds",
                self.tpot,
                "Mean time per output token after the first",
            ),
            ("e2e_request_latency_seconds", self.e2e, "Arrival to the end"),
            ("request_queue_time_seconds", self.queue, "Arrival to admission"),
            ("request_inference_time_seconds", self.inference, "Admission to the end"),
            ("request_prompt_tokens", self.prompt_tokens, "Prompt tokens of a request"),
            ("request_generation_tokens", self.generation_tokens, "Output tokens of a request"),
            (
                "grammar_compile_seconds",
                self.grammar_compile,
                "Compilation of a grammar that was not known yet",
            ),
        ):
            yield histogram.family(name, text, model)
        for level, histogram in self.queue_by_priority.items():
            yield histogram.family(
                "request_queue_time_by_priority_seconds", "Arrival to admission, by the sign of the request's priority",
                model, {"priority": level},
            )  # fmt: skip
        success = CounterMetricFamily(
            PREFIX + "request_success", "Ended requests", labels=(*_LABEL, "finished_reason")
        )
        for reason, count in self.finished.items():
            success.add_metric([model, reason.value], count)
        yield success
        if self.lora is None:
            yield self.step_tokens.family("iteration_tokens_total", "Tokens computed in a step", model)
            yield self.step_seconds.family("iteration_time_seconds", "Duration of a step", model)


class EngineMetrics(Collector):
    """All engines of a host, and what else `about` and `http` tell, as one Prometheus collector in its own registry."""

    def __init__(self, *, kept_s: float = KEPT_S) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.http = HttpMetrics()
        self._kept_s = kept_s
        self._lock = threading.Lock()
        self._engines: dict[str, tuple[EngineWorker, EngineSink]] = {}
        self._gone: dict[str, tuple[float, list[Metric]]] = {}  # until when (monotonic), and the last values
        self._about: list[Callable[[], Iterable[Metric]]] = []
        self.registry.register(self)

    def about(self, families: Callable[[], Iterable[Metric]]) -> None:
        """Have `families` asked at each scrape too."""
        self._about.append(families)

    def watch(self, card: ModelCard, worker: EngineWorker) -> None:
        """Count `worker` from now on (an EngineHost's `on_ready`). The same id again replaces the former engine."""
        sink = EngineSink(worker.lora)
        worker.add_sink(sink)
        with self._lock:
            self._engines[card.id] = (worker, sink)
            self._gone.pop(card.id, None)

    def unwatch(self, card: ModelCard, worker: EngineWorker) -> None:
        """An engine was closed (an EngineHost's `on_closed`): its gauges go, its counts a while later.

        Its successor of the same id stays.
        """
        with self._lock:
            known = self._engines.get(card.id)
            if known is None or known[0] is not worker:
                return
            del self._engines[card.id]
            counts = [family for family in _families(card.id, *known) if family.type != "gauge"]
            self._gone[card.id] = (time.monotonic() + self._kept_s, counts)

    def engines(self) -> list[EngineWorker]:
        """The workers that are engines of their own: adapters are counted with their base."""
        with self._lock:
            return [worker for worker, _ in self._engines.values() if worker.lora is None]

    def describe(self) -> Iterable[Metric]:
        """No metric before there is an engine."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One family a metric, with a sample for each model: the format allows a name to be described once."""
        now = time.monotonic()
        with self._lock:
            engines = list(self._engines.items())
            self._gone = {name: kept for name, kept in self._gone.items() if kept[0] > now}
            gone = [family for _, families in self._gone.values() for family in families]
        told = [family for model, (worker, sink) in engines for family in _families(model, worker, sink)]
        others = [family for families in self._about for family in families()]
        found: dict[str, Metric] = {}
        for family in (*told, *gone, *others, *self.http.families(PREFIX)):
            if family.name not in found:
                found[family.name] = copy.copy(family)
                found[family.name].samples = []
            found[family.name].samples += family.samples
        yield from found.values()


def _due_s(worker: EngineWorker) -> float:
    since = worker.awaited_since_ns
    return 0.0 if since is None else (time.monotonic_ns() - since) / 1e9


def _families(model: str, worker: EngineWorker, sink: EngineSink) -> Iterator[Metric]:
    if worker.lora is None:
        yield from _stats_families(model, worker)
    yield from sink.families(model)


def _stats_families(model: str, worker: EngineWorker) -> Iterator[Metric]:
    stats = worker.stats()
    used = stats.num_blocks - stats.num_free_blocks
    gauges = (
        ("num_requests_running", stats.num_running, "Requests that hold a row"),
        ("num_requests_waiting", stats.num_waiting, "Requests in the queue"),
        (
            "kv_cache_usage_perc",
            used / stats.num_blocks if stats.num_blocks else 0.0,
            "Used KV blocks, 1 is all",
        ),
        ("num_tokens_waiting", stats.num_waiting_tokens, "Tokens of the requests in the queue"),
        ("kv_cache_blocks", stats.num_blocks, "KV blocks in the pool"),
        ("kv_cache_cached_blocks", stats.num_cached_blocks, "Free blocks that can still be matched"),
        ("kv_cache_host_blocks", stats.num_host_blocks, "KV blocks that host memory can keep"),
        ("kv_cache_cached_host_blocks", stats.num_cached_host_blocks, "KV blocks that are kept there"),
        ("engine_healthy", float(worker.health().ok), "1 while the engine is healthy"),
        (
            "engine_step_due_seconds",
            _due_s(worker),
            "How long a step that succeeds has been due, 0 when idle",
        ),
    )
    counters = (
        ("prompt_tokens", stats.prompt_tokens, "Prompt tokens of admitted requests"),
        ("generation_tokens", stats.output_tokens, "Output tokens"),
        ("prefix_cache_queries", stats.prompt_tokens, "Prompt tokens looked up in the prefix cache"),
        ("prefix_cache_hits", stats.cached_prompt_tokens, "Prompt tokens taken from the prefix cache"),
        ("kv_cache_blocks_out", stats.blocks_out, "KV blocks copied to host memory"),
        ("kv_cache_blocks_back", stats.blocks_back, "KV blocks copied from host memory"),
        ("num_preemptions", stats.preemptions, "Preemptions"),
        ("spec_decode_num_draft_tokens", stats.draft_tokens, "Guessed tokens that were computed"),
        ("spec_decode_num_accepted_tokens", stats.accepted_tokens, "Guessed tokens that were right"),
        ("num_requests_refused", worker.num_refused, "Requests refused because the queue was full"),
        ("engine_steps", stats.steps, "Steps"),
        ("engine_step_errors", stats.step_errors, "Steps that failed"),
    )
    for name, value, text in gauges:
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=_LABEL)
        gauge.add_metric([model], value)
        yield gauge
    for name, value, text in counters:
        counter = CounterMetricFamily(PREFIX + name, text, labels=_LABEL)
        counter.add_metric([model], value)
        yield counter
