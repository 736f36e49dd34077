"""Endpoints by name: what is accepted, what is stored, what answers there, and what each kind is asked."""

from __future__ import annotations

import email.utils
import json
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fleet_shapes import Reply, Shaped, stream

from engine.sampling_params import SamplingParams
from workbench import cli
from workbench.backends.by_id import ByIdBackend
from workbench.backends.discovery import discover, identify
from workbench.backends.endpoint_backend import EndpointBackend
from workbench.backends.endpoints import (
    Endpoint,
    EndpointError,
    EndpointKeyError,
    Endpoints,
    UnknownEndpointError,
    endpoint,
    parse_id,
)
from workbench.backends.protocol import BackendError, BackendLostError, BackendUnsupportedError
from workbench.backends.retries import Retries, retry_after_s
from workbench.fleet.status import DRAINING, LOADING, READY, read_status
from workbench.settings import Settings
from workbench.store import Store

Make = Callable[[dict[str, Any]], Shaped]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
CHAT = [{"role": "user", "content": "Hello"}]


# ── names and addresses ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "url", "more"),
    [
        ("a b", "http://x", {}), ("", "http://x", {}), ("a", "ftp://x", {}), ("a", "file:///etc/passwd", {}), ("a", "x:8000", {}),
        ("a", "http://", {}), ("a", "http://user:secret@x", {}), ("a", "http://x?a=secret", {}), ("a", "http://x#f", {}),
        ("a", "http://169.254.169.254/latest", {}), ("a", "http://[fe80::1]", {}), ("a", "http://0.0.0.0:1", {}),
        ("a", "http://[::ffff:169.254.169.254]", {}), ("a", "http://x:99999", {}),
        ("a", "http://x", {"kind": "vlm"}), ("a", "http://x", {"key_env": "sk-secret"}),
        ("a", "http://api.example.com", {"key_env": "KEY"}), ("a", "http://8.8.8.8", {"key_env": "KEY"}),
        ("a", "https://x", {"api_version": "1"}), ("a", "https://x", {"kind": "azure", "api_version": "2024-10-21"}),
    ],
)  # fmt: skip
def test_what_is_no_endpoint_is_refused_without_repeating_secrets(
    name: str, url: str, more: dict[str, Any]
) -> None:
    with pytest.raises(EndpointError) as caught:
        endpoint(name, url, **more)
    assert caught.value.limit
    assert caught.value.remedy
    assert "secret" not in f"{caught.value} {caught.value.value}"


@pytest.mark.parametrize(
    ("kind", "url", "base"),
    [
        ("vllm", "http://h:8000/v1/", "http://h:8000/v1"), ("openai", "https://api.openai.com", "https://api.openai.com/v1"),
        ("openai", "https://x.example/api/v1", "https://x.example/api/v1"),
        ("azure", "https://r.openai.azure.com/", "https://r.openai.azure.com/openai/v1"),
        ("mlflow-gateway", "http://m:5000", "http://m:5000/gateway/mlflow/v1"),
        ("mlflow-gateway", "http://m:5000/mlflow/gateway/mlflow/v1", "http://m:5000/mlflow/gateway/mlflow/v1"),
    ],
)  # fmt: skip
def test_the_base_url_is_the_one_that_clients_use(kind: str, url: str, base: str) -> None:
    assert endpoint("a", url, kind=kind).base_url == base


def test_a_key_is_read_from_its_variable_and_never_stored(
    store: Store, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoints = Endpoints(store)
    monkeypatch.setenv("A_KEY", "sk-very-secret")
    endpoints.add(endpoint("a", "https://x.example", key_env="A_KEY"))
    endpoints.add(endpoint("z", "https://r.openai.azure.com", kind="azure", key_env="A_KEY"))
    assert endpoints.get("a").headers() == {"authorization": "Bearer sk-very-secret"}
    assert endpoints.get("z").headers() == {"api-key": "sk-very-secret"}
    with sqlite3.connect(home / "quire.db") as connection:
        assert "A_KEY" in "\n".join(connection.iterdump())
        assert "sk-very-secret" not in "\n".join(connection.iterdump())
    monkeypatch.delenv("A_KEY")
    with pytest.raises(EndpointKeyError, match="A_KEY"):
        endpoints.get("a").headers()
    with pytest.raises(EndpointError, match="already"):
        endpoints.add(endpoint("a", "https://y.example"))
    endpoints.add(endpoint("a", "https://y.example"), replace=True)
    assert [each.url for each in endpoints.list()] == ["https://y.example", "https://r.openai.azure.com"]
    endpoints.remove("a")
    with pytest.raises(UnknownEndpointError, match="z"):
        endpoints.get("a")


def test_an_id_names_endpoint_and_model() -> None:
    assert (parse_id("endpoint:a/org/m").endpoint, parse_id("endpoint:a/org/m").model) == ("a", "org/m")
    assert parse_id("endpoint:a").model is None
    for wrong in ("a/m", "endpoint:", "endpoint:/m", "endpoint:a b/m"):
        with pytest.raises(EndpointError):
            parse_id(wrong)


# ── discovery and status: each server's documented answers ──────────────────────────────────────────────────────────────


def models(*ids: str, owner: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner} for name in ids]}


VLLM_METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="qwen"} 3.0
vllm:num_requests_running{engine="1",model_name="qwen"} 2.0
vllm:num_requests_waiting{engine="0",model_name="qwen"} 4.0
vllm:num_requests_waiting_by_reason{reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="qwen"} 0.25
"""
SHAPES: dict[str, dict[str, Any]] = {
    # docs.vllm.ai, "OpenAI-Compatible Server" and "Production Metrics"
    "vllm": {"GET /v1/models": models("qwen", owner="vllm"), "GET /version": {"version": "0.11.2"},
             "GET /health": Reply(""), "GET /metrics": Reply(VLLM_METRICS)},
    # ollama/docs/api.md and docs.ollama.com/api/openai-compatibility
    "ollama": {"GET /v1/models": models("llama3.2:latest", "gemma3:4b", owner="library"), "GET /api/version": {"version": "0.12.6"},
               "GET /api/tags": {"models": [{"name": "llama3.2:latest"}]}, "GET /api/ps": {"models": [{"name": "gemma3:4b"}]}},
    # llama.cpp tools/server/README.md
    "llama.cpp": {"GET /v1/models": models("model.gguf", owner="llamacpp"), "GET /health": {"status": "ok"},
                  "GET /props": {"total_slots": 4, "build_info": "b6900-1234", "default_generation_settings": {}},
                  "GET /slots": Reply([{"id": i, "is_processing": i == 2} for i in range(4)])},
    # lmstudio.ai/docs/developer/rest/endpoints
    "lmstudio": {"GET /v1/models": models("a", "b", owner="organization_owner"),
                 "GET /api/v0/models": {"data": [{"id": "a", "state": "loaded"}, {"id": "b", "state": "not-loaded"}]}},
    # MLflow 3.17, server/gateway_api.py: list_models
    "mlflow-gateway": {"GET /gateway/mlflow/v1/models": models("claude", owner="mlflow")},
    "openai": {"GET /v1/models": models("gpt-5", owner="system")},
}  # fmt: skip
VERSIONS = {"vllm": "0.11.2", "ollama": "0.12.6", "llama.cpp": "b6900-1234"}


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_the_kind_is_what_answers_there(shaped: Make, kind: str) -> None:
    server = shaped(SHAPES[kind])
    path = "/gateway/mlflow/v1" if kind == "mlflow-gateway" else "/v1"
    made, found = identify("e", server.url + path)
    assert (made.kind, found.kind, found.version) == (kind, kind, VERSIONS.get(kind, ""))
    assert found.models[0]


def test_status_tells_load_in_what_each_kind_knows(shaped: Make) -> None:
    read = {kind: read_status(endpoint("e", shaped(SHAPES[kind]).url, kind=kind)) for kind in SHAPES}
    assert {each.state for each in read.values()} == {READY}
    vllm, llama = read["vllm"], read["llama.cpp"]
    assert (vllm.running, vllm.waiting, vllm.kv_usage, vllm.max_num_seqs, vllm.free_slots) == (
        5,
        4,
        0.25,
        None,
        None,
    )
    assert (llama.running, llama.max_num_seqs, llama.free_slots) == (1, 4, 3)
    assert (read["ollama"].models, read["lmstudio"].models) == (("gemma3:4b",), ("a",))
    assert (read["openai"].running, read["openai"].models) == (None, ("gpt-5",))
    loading = shaped({"GET /health": Reply({"error": {"code": 503, "message": "Loading model"}}, 503)})
    assert read_status(endpoint("e", loading.url, kind="llama.cpp")).state == LOADING
    load = {"server_load": 1, "running": 1, "waiting": 2, "waiting_tokens": 90, "max_num_seqs": 8, "num_blocks": 64,
            "free_blocks": 60, "block_size": 16, "ready": False, "draining": True, "phase": "ready", "message": "",
            "models": ["m"], "version": "1"}  # fmt: skip
    quire = read_status(endpoint("e", shaped({"GET /load": load}).url, kind="quire"))
    assert (quire.state, quire.free_slots, quire.waiting_tokens, quire.free_blocks) == (DRAINING, 5, 90, 60)
    with pytest.raises(BackendError, match="does not answer as Quire"):
        read_status(endpoint("e", shaped({"GET /load": {"server_load": 1}}).url, kind="quire"))


def test_discovery_follows_no_redirect_and_names_what_is_wrong(shaped: Make) -> None:
    inside = shaped({"GET /v1/models": models("m", owner="x")})
    away = shaped({"GET /v1/models": Reply("", 307, {"location": f"{inside.url}/v1/models"})})
    with pytest.raises(BackendError, match="sends elsewhere"):
        discover(endpoint("e", away.url))
    assert inside.asked == []
    with pytest.raises(BackendError, match="wants a key"):
        discover(endpoint("e", shaped({"GET /v1/models": Reply({}, 401)}).url))
    with pytest.raises(BackendError, match="no OpenAI-compatible"):
        discover(endpoint("e", shaped({"GET /v1/models": Reply("<html>")}).url))
    with pytest.raises(BackendLostError, match="nothing answers"):
        discover(endpoint("e", "http://127.0.0.1:9"))


# ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_azure_is_asked_by_deployment_or_by_its_v1_api(shaped: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZ", "k")
    classic = "POST /openai/deployments/dep/chat/completions?api-version=2024-10-21"
    server = shaped({classic: stream("Hi"), "POST /openai/v1/chat/completions": stream("Ho")})
    old = Endpoint("az", server.url, "azure", "AZ", "dep", "2024-10-21")
    with EndpointBackend(old) as backend:
        assert backend.chat(CHAT, GREEDY)[0].text == "Hi"
    with EndpointBackend(Endpoint("az", server.url, "azure", "AZ"), "gpt") as backend:
        assert backend.chat(CHAT, GREEDY)[0].text == "Ho"
    assert [headers["api-key"] for _, headers, _ in server.asked] == ["k", "k"]
    assert all("authorization" not in headers for _, headers, _ in server.asked)


def test_what_a_kind_does_not_take_is_refused_before_it_is_asked(shaped: Make) -> None:
    server = shaped({**SHAPES["ollama"], "POST /v1/chat/completions": stream("a", "b")})
    with EndpointBackend(endpoint("o", server.url, kind="ollama", model="m")) as backend:
        with pytest.raises(BackendUnsupportedError, match="does not take top_k, min_p") as caught:
            backend.chat(CHAT, SamplingParams(top_k=5, min_p=0.1))
        assert caught.value.param == "top_k"
        for call in (
            lambda: backend.score("x"),
            lambda: backend.rerank("q", ["d"]),
            lambda: backend.load("m", deterministic=True),
        ):
            with pytest.raises(BackendUnsupportedError):
                call()
        assert server.asked == []
        done = backend.chat(
            CHAT, SamplingParams(seed=3, stop=("x",), max_tokens=4), model="endpoint:o/other"
        )[0]
    assert (done.text, done.num_prompt_tokens, done.num_output_tokens) == ("ab", 3, 2)
    sent = server.bodies("POST /v1/chat/completions")[0]
    assert (sent["model"], sent["seed"], sent["stop"], sent["max_tokens"]) == ("other", 3, ["x"], 4)
    assert not {"top_k", "min_p", "logprobs"} & set(sent)


def test_embeddings_rerank_and_scores_are_read(shaped: Make) -> None:
    server = shaped({
        "POST /v1/embeddings": {"data": [{"index": 0, "embedding": [0.6, 0.8]}], "usage": {"prompt_tokens": 2}},
        "POST /v1/rerank": {"results": [{"index": 1, "relevance_score": 0.2}, {"index": 0, "relevance_score": 0.9}]},
        "POST /v1/completions": {"choices": [{"logprobs": {"token_logprobs": [None, -1.0, -3.0, -9.0]}}],
                                 "usage": {"completion_tokens": 1}},
    })  # fmt: skip
    with EndpointBackend(endpoint("v", server.url, kind="vllm", model="m")) as backend:
        found = backend.embed(["a", "b"])
        assert [(each.vector.tolist(), each.num_prompt_tokens) for each in found] == [([0.6, 0.8], 2)] * 2
        assert [each.index for each in backend.rerank("q", ["x", "y"])] == [0, 1]
        score = backend.score("text")[0]
    assert (score.logprobs, score.total_logprob, len(score.token_ids)) == ((-1.0, -3.0), -4.0, 3)
    assert server.bodies("POST /v1/completions")[0]["echo"] is True


def test_only_what_was_not_begun_is_sent_again_after_the_time_that_the_server_asks_for(shaped: Make) -> None:
    busy, broken = (
        Reply({"error": {"message": "busy"}}, 429, {"retry-after": "7"}),
        Reply({"error": {"message": "x"}}, 500),
    )
    server = shaped({"POST /v1/chat/completions": [busy, Reply({}, 503), stream("ok")]})
    pauses: list[float] = []
    retries = Retries(sleep=pauses.append)
    with EndpointBackend(endpoint("v", server.url, kind="vllm"), "m", retries=retries) as backend:
        assert backend.chat(CHAT, GREEDY)[0].text == "ok"
        assert pauses[0] == 7.0
        assert 0 <= pauses[1] <= 1.0, "the second pause is drawn from twice the first one's half second"
        for reply, times in (
            (broken, 1),
            (busy, 3),
            (Reply({}, 429, {"retry-after": "3600"}), 1),
            (Reply({}, 307), 1),
        ):
            server.routes["POST /v1/chat/completions"], before = reply, len(server.asked)
            with pytest.raises(BackendError):
                backend.chat(CHAT, GREEDY)
            assert len(server.asked) - before == times, reply
    soon = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=60))
    assert 50 < (retry_after_s(httpx.Headers({"retry-after": soon})) or 0) <= 60
    assert retry_after_s(httpx.Headers({"retry-after": "soon"})) is None


def test_by_id_only_what_is_asked_for_is_opened(shaped: Make, store: Store, settings: Settings) -> None:
    server = shaped({**SHAPES["vllm"], "POST /v1/chat/completions": stream("there")})
    Endpoints(store).add(endpoint("v", server.url, kind="vllm"))

    def local() -> Any:
        raise AssertionError("no model of this machine was asked for")

    with ByIdBackend(settings, local) as backend:
        assert backend.load("endpoint:v/qwen", deterministic=True) == "endpoint:v/qwen"
        assert backend.chat(CHAT, GREEDY, model="endpoint:v/qwen")[0].text == "there"
        backend.unload("endpoint:v/qwen")
        with pytest.raises(BackendUnsupportedError):
            backend.token_kl("x", other="endpoint:v/qwen", model="here")
        with pytest.raises(UnknownEndpointError):
            backend.chat(CHAT, GREEDY, model="endpoint:w/qwen")


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_adds_checks_asks_and_removes(
    shaped: Make, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = shaped({**SHAPES["vllm"], "POST /v1/chat/completions": stream("Hello ", "you")})

    def quire(*arguments: str) -> dict[str, Any]:
        code = cli.main([*arguments, "--home-dir", str(home), "--json"])
        told: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        return {**told, "code": code}

    assert quire("endpoints", "add", "gpu", server.url)["endpoint"]["kind"] == "vllm"
    assert quire("endpoints", "list")["endpoints"][0]["url"] == server.url
    checked = quire("endpoints", "check", "gpu")
    assert (checked["code"], checked["endpoints"][0]["running"]) == (0, 5)
    said = quire("chat", "Hi", "--model", "endpoint:gpu/qwen")
    assert (said["text"], said["model"], said["completion_tokens"]) == ("Hello you", "qwen", 2)
    assert quire("chat", "Hi", "--model", "endpoint:none/x")["error"]["code"] == "endpoint_not_found"
    assert quire("endpoints", "drain", "gpu")["error"]["code"] == "backend_error"
    assert quire("endpoints", "remove", "gpu")["code"] == 0
    assert quire("endpoints", "list")["endpoints"] == []


# ── a comparison of two endpoints ───────────────────────────────────────────────────────────────────────────────────────


def test_two_endpoints_are_compared_by_their_outputs_and_what_they_cannot_tell_is_said_first(
    shaped: Make, store: Store, settings: Settings, tmp_path: Path
) -> None:
    from workbench.evals.compare import compare
    from workbench.evals.errors import CompareSpecError
    from workbench.evals.job import prepare
    from workbench.evals.scorers import make_scorers

    lines = [
        {"id": str(i), "messages": [{"role": "user", "content": f"q{i}"}], "expected": "Paris"}
        for i in range(6)
    ]
    file = tmp_path / "capitals.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    right, wrong = (shaped({"POST /v1/chat/completions": stream(text)}) for text in ("Paris", "Rome"))
    for name, server, kind in (("good", right, "ollama"), ("bad", wrong, "lmstudio")):
        Endpoints(store).add(endpoint(name, server.url, kind=kind))
    spec = {"a": "endpoint:bad/m", "b": "endpoint:good/m", "dataset": str(file), "scorers": ["exact_match"]}
    setup = prepare({**spec, "speed": False}, settings)
    with ByIdBackend(settings, lambda: pytest.fail("no model of this machine is needed")) as backend:
        found = compare(backend, setup.a, setup.b, setup.dataset, make_scorers(["exact_match"]))
    metric = found.metrics["exact_match"]
    assert (metric.a, metric.b, metric.n, found.repeatable) == (0.0, 1.0, 6, None)
    for more, param in (({"divergence": True, "speed": False}, "divergence"), ({"speed": True}, "speed")):
        with pytest.raises(CompareSpecError) as caught:
            prepare({**spec, **more}, settings)
        assert caught.value.param == param
