"""/metrics: valid Prometheus text whose numbers agree with what the clients were told."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.sampling_params import SamplingParams
from workbench.api.metrics import EngineMetrics, Histogram
from workbench.host import ModelCard, fake_worker

VLLM_NAMES = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens", "generation_tokens",
    "prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "request_success", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total",
    "grammar_compile_seconds",
}  # fmt: skip


def scrape(server: Any) -> dict[str, Any]:
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return scrape_of(text_string_to_metric_families(response.text))


def scrape_of(families: Any) -> dict[str, Any]:
    return {f.name.removeprefix("quire:"): f for f in families}


def value(families: dict[str, Any], sample: str, **labels: str) -> float:
    for family in families.values():
        for entry in family.samples:
            if entry.name == f"quire:{sample}" and labels.items() <= entry.labels.items():
                return float(entry.value)
    raise AssertionError(f"no sample {sample} {labels}")


def test_counters_and_histograms_agree_with_the_usage(serve: Any, eventually: Any) -> None:
    with serve(partial(fake_worker, delay_s=0.001)) as server:
        prompts = ["a prompt that fills more than one block of sixteen tokens"] * 2 + ["short"]
        usages = [server.post("/v1/completions", prompt=p, max_tokens=8).json()["usage"] for p in prompts]
        assert eventually(lambda: len(server.worker.records.requests()) == 3)
        assert eventually(lambda: server.worker.stats().finished.get("length") == 3)
        # The engine thread tells one sink after the other, and the histograms one after the other.
        assert eventually(lambda: value(scrape(server), "inter_token_latency_seconds_count") == 3 * 7)
        metrics = scrape(server)
    assert set(metrics) >= VLLM_NAMES
    assert value(metrics, "generation_tokens_total", model_name="fake-echo") == 24
    assert value(metrics, "prompt_tokens_total") == sum(u["prompt_tokens"] for u in usages)
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usages)
    assert value(metrics, "prefix_cache_hits_total") == cached > 0
    assert value(metrics, "request_success_total", finished_reason="length") == 3
    assert value(metrics, "request_success_total", finished_reason="stop") == 0
    assert value(metrics, "time_to_first_token_seconds_count") == 3
    assert value(metrics, "inter_token_latency_seconds_count") == 3 * 7
    assert value(metrics, "e2e_request_latency_seconds_sum") >= 3 * 8 * 0.001
    assert value(metrics, "num_requests_running") == 0
    assert value(metrics, "kv_cache_usage_perc") == 0
    assert value(metrics, "engine_healthy") == 1


def test_gauges_show_what_runs(serve: Any, eventually: Any) -> None:
    with serve(partial(fake_worker, delay_s=0.01)) as server:
        stream = server.openai.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "x" * 100}], stream=True
        )
        next(iter(stream))
        assert eventually(lambda: value(scrape(server), "num_requests_running") == 1)
        assert value(scrape(server), "kv_cache_usage_perc") > 0
        stream.close()


def test_blocks_that_go_to_host_memory_and_come_back_are_counted(serve: Any) -> None:
    def tight(config: Any, **hooks: Any) -> Any:
        return fake_worker(
            replace(config, num_blocks=12, max_model_len=192, swap_space_bytes=1 << 20), delay_s=0, **hooks
        )

    with serve(tight) as server:
        for letter in "aba":
            server.post("/v1/completions", prompt=letter * 150, max_tokens=4)
        metrics, stats = scrape(server), server.worker.stats()
    assert value(metrics, "kv_cache_blocks_out_total") == stats.blocks_out > 0
    assert value(metrics, "kv_cache_blocks_back_total") == stats.blocks_back > 0
    assert value(metrics, "kv_cache_cached_host_blocks") == stats.num_cached_host_blocks > 0
    assert value(metrics, "kv_cache_host_blocks") == stats.num_host_blocks


def test_before_a_model_is_there_the_page_tells_of_the_server_alone(serve: Any) -> None:
    def never(config: Any, **hooks: Any) -> Any:
        raise RuntimeError("no")

    with serve(never, wait=False) as server:
        server.host.wait(5)
        families = scrape(server)
        samples = {sample.name for family in families.values() for sample in family.samples}
        assert samples == {"quire:build_info"}


def test_requests_are_counted_by_status_and_by_the_reason_of_refusals(serve: Any) -> None:
    with serve(partial(fake_worker, delay_s=0.0)) as server:
        server.post(max_tokens=2)
        server.post(max_tokens=-1)
        server.post(model="nobody")
        for path in ("/v1/made-up", "/v1/made-up/2", "/elsewhere/1", "/elsewhere/2"):
            server.http.get(path)
        metrics = scrape(server)
    chat = {"method": "POST", "route": "/v1/chat/completions"}
    assert value(metrics, "http_requests_total", **chat, status="200") == 1
    assert value(metrics, "http_requests_total", **chat, status="400") == 1
    assert value(metrics, "http_requests_total", route="/v1/*", status="404") == 2
    assert value(metrics, "http_requests_total", route="pages", status="404") == 2
    refused = {s.labels["reason"]: s.value for s in metrics["http_requests_refused"].samples}
    assert refused == {"invalid_params": 1, "model_not_found": 1}


def test_waits_are_told_by_the_sign_of_the_priority(serve: Any) -> None:
    with serve(partial(fake_worker, delay_s=0.0)) as server:
        for priority in (-7, 0, 3, 99):
            server.post(max_tokens=2, priority=priority)
        metrics = scrape(server)
    name = "request_queue_time_by_priority_seconds_count"
    counts = {level: value(metrics, name, priority=level) for level in ("high", "default", "low")}
    assert counts == {"high": 1, "default": 1, "low": 2}


def test_counts_of_an_unloaded_version_stay_a_while_and_then_go() -> None:
    card = ModelCard("tickets/3", "", "", False, "", "", "", None, None)
    for kept_s, names in ((60.0, {"tickets/3"}), (0.0, set())):
        metrics = EngineMetrics(kept_s=kept_s)
        worker = fake_worker(delay_s=0.0)
        metrics.watch(card, worker)
        worker.start()
        worker.submit("hello", SamplingParams(max_tokens=3)).result()
        worker.close()
        metrics.unwatch(card, worker)
        for _ in range(2):  # a scrape changes nothing of what is kept
            families = {f.name.removeprefix("quire:"): f for f in metrics.collect()}
            told = {s.labels["model_name"] for f in families.values() for s in f.samples}
            assert told == names
            assert not any(f.samples for f in families.values() if f.type == "gauge")
        if names:
            assert value(families, "generation_tokens_total", model_name="tickets/3") == 3


def test_the_page_keeps_the_rules_of_the_format(serve: Any) -> None:
    """What `promtool check metrics` and the exposition format ask, of a server whose every family has samples."""
    with serve(partial(fake_worker, delay_s=0.0)) as server:
        server.post(max_tokens=2)
        server.post(max_tokens=-1)
        server.http.get("/metrics")
        text = server.http.get("/metrics").text
        families = list(text_string_to_metric_families(text))
    assert value(scrape_of(families), "model_info", model_name="fake-echo") == 1
    assert value(scrape_of(families), "build_info") == 1
    seen: set[str] = set()
    for family in families:
        assert family.name not in seen, f"{family.name} is described twice"
        seen.add(family.name)
        assert family.documentation, f"{family.name} has no HELP"
        assert family.type in ("counter", "gauge", "histogram"), f"{family.name} has no TYPE"
        assert re.fullmatch(r"quire:[a-z0-9_]+", family.name)
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|counter|gauge|count|sum)$", family.name)
        keys = [(s.name, *sorted(s.labels.items())) for s in family.samples]
        assert len(keys) == len(set(keys)), f"{family.name} tells a series twice"
        if family.type == "counter":
            assert all(s.name.endswith("_total") for s in family.samples)
        if family.type == "gauge":
            assert not family.name.endswith("_total")
    for line in text.splitlines():  # the parser takes samples that nothing describes
        if not line.startswith("#"):
            name = re.match(r"[a-z_:0-9]+", line)[0]
            bare = re.sub(r"_(total|bucket|count|sum|created)$", "", name)
            assert {name, bare} & seen or f"{bare}_total" in seen


@pytest.mark.parametrize("many", [False, True])
def test_histogram_counts_each_value_in_its_bucket(many: bool) -> None:
    values = np.array([0.5, 1.0, 1.5, 2.0, 99.0])
    histogram = Histogram((1.0, 2.0))
    if many:
        histogram.observe_many(values)
    else:
        for entry in values:
            histogram.observe(float(entry))
    samples = {s.labels.get("le", s.name): s.value for s in histogram.family("x", "", "m").samples}
    assert (samples["1.0"], samples["2.0"], samples["+Inf"]) == (2, 4, 5)
    assert samples["quire:x_sum"] == values.sum()
