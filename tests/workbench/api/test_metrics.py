"""/metrics: valid Prometheus text whose numbers agree with what the clients were told."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from workbench.api.metrics import Histogram
from workbench.host import fake_worker

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
    return {f.name.removeprefix("quire:"): f for f in text_string_to_metric_families(response.text)}


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


def test_before_a_model_is_there_the_page_is_empty_and_valid(serve: Any) -> None:
    def never(config: Any, **hooks: Any) -> Any:
        raise RuntimeError("no")

    with serve(never, wait=False) as server:
        server.host.wait(5)
        assert scrape(server) == {}


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
