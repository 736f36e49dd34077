"""The routes of this machine's own programs: closed without the token, and exact: token ids, log-probabilities, records."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.llm import LLM
from engine.sampling_params import SamplingParams
from workbench.backends import codec
from workbench.host import fake_worker
from workbench.versions.ref import ResolvedVersion, VersionRef

ROUTES = [
    ("GET", "/quire/residents"), ("GET", "/quire/stats"), ("GET", "/quire/records"), ("POST", "/quire/load"),
    ("POST", "/quire/unload"), ("POST", "/quire/generate"), ("POST", "/quire/chat"), ("POST", "/quire/score"),
]  # fmt: skip
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def versioned(serve: Any, tiny_model: Path) -> Iterator[Any]:
    """A server over FakeRunner whose registry knows tickets/1 and tickets/2."""

    def resolver(ref: str) -> Any:
        version = 1 if "@" in ref else int(ref.rpartition("/")[2])
        return ResolvedVersion(VersionRef("tickets", version, None, f"digest-{version}", ""), tiny_model)

    with serve(partial(fake_worker, delay_s=0.002), resolver=resolver) as running:
        yield running


@pytest.fixture
def inside(versioned: Any) -> Iterator[httpx.Client]:
    yield from client_of(versioned)


@pytest.fixture
def real_inside(real_server: Any) -> Iterator[httpx.Client]:
    yield from client_of(real_server)


def client_of(server: Any) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {server.token}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60, verify=False) as client:  # plain HTTP
        yield client


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", "Basic x", "bearer-less"])
def test_every_route_needs_the_token(versioned: Any, method: str, path: str, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given}
    answer = versioned.http.request(method, path, headers=headers, json={} if method == "POST" else None)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"]["code"] == "unauthorized"
    assert versioned.token not in answer.text


def test_the_token_does_not_open_the_door_to_other_sites(versioned: Any, inside: httpx.Client) -> None:
    assert inside.get("/quire/residents", headers={"origin": "https://evil.example"}).status_code == 403
    assert versioned.http.get("/v1/models").status_code == 200, "the public routes stay open"


def test_load_use_and_unload_a_version(versioned: Any, inside: httpx.Client) -> None:
    loaded = inside.post("/quire/load", json={"ref": "tickets/2"}).json()
    assert (loaded["id"], loaded["resident"]["version"]) == ("tickets/2", 2)
    exact = inside.post("/quire/load", json={"ref": "models:/tickets/2", "deterministic": True}).json()["id"]
    assert exact == "tickets/2#deterministic"
    residents = inside.get("/quire/residents").json()["residents"]
    assert [(each["id"], each["is_default"]) for each in residents] == [
        ("fake-echo", True), ("tickets/2", False), (exact, False),
    ]  # fmt: skip
    assert versioned.openai.models.retrieve("tickets/2").id == "tickets/2"
    for model in ("tickets/2", "models:/tickets/2", exact, "fake-echo"):
        answer = versioned.openai.completions.create(model=model, prompt="hi", max_tokens=5)
        assert (answer.model, answer.usage.completion_tokens) == (model, 5)
        used = inside.get("/quire/stats", params={"model": model}).json()["stats"]
        assert codec.stats_from_json(used).output_tokens >= 5
    for model in ("tickets/2", exact):
        assert inside.post("/quire/unload", json={"id": model}).status_code == 200
    assert versioned.post(path="/v1/completions", model="tickets/2", prompt="hi").status_code == 404
    gone = inside.post("/quire/unload", json={"id": "tickets/2"})
    assert (gone.status_code, gone.json()["error"]["limit"]) == (404, ["fake-echo"])


def test_models_lists_every_resident_with_digest_version_and_alias(
    versioned: Any, inside: httpx.Client
) -> None:
    inside.post("/quire/load", json={"ref": "tickets@champion"})
    try:
        found = {each["id"]: each for each in versioned.http.get("/v1/models").json()["data"]}
        assert set(found) == {"fake-echo", "tickets/1"}
        shown = found["tickets/1"]
        assert (shown["digest"], shown["version"], shown["aliases"]) == ("digest-1", 1, ["tickets@champion"])
        [followed] = inside.get("/quire/residents").json()["followed"] or [None]
        assert followed is None, "a program's load follows nothing"
        by_alias = versioned.http.get("/v1/models/tickets@champion").json()
        assert by_alias["id"] == "tickets/1"
        answer = versioned.openai.chat.completions.create(
            model="tickets@champion", messages=[{"role": "user", "content": "hi"}], max_tokens=3
        )
        assert answer.model == "tickets@champion"
        refused = versioned.post(model="tickets@nobody")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert "tickets/1" in refused.json()["error"]["message"]
    finally:
        inside.post("/quire/unload", json={"id": "tickets/1"})


def test_metrics_describe_each_name_once_and_label_every_model(versioned: Any, inside: httpx.Client) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    inside.post("/quire/load", json={"ref": "tickets/1"})
    try:
        versioned.post(path="/v1/completions", model="tickets/1", prompt="hi", max_tokens=4)
        text = versioned.http.get("/metrics").text
        described = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(described) == len(set(described))
        families = {family.name: family for family in text_string_to_metric_families(text)}
        labels = {sample.labels["model_name"] for sample in families["quire:generation_tokens"].samples}
        assert labels >= {"fake-echo", "tickets/1"}  # others may be draining
        made = {s.labels["model_name"]: s.value for s in families["quire:generation_tokens"].samples}
        assert made["tickets/1"] == 4
    finally:
        inside.post("/quire/unload", json={"id": "tickets/1"})


def test_a_closed_model_leaves_the_metrics(versioned: Any, inside: httpx.Client, eventually: Any) -> None:
    """Its gauges at once; what it counted is told a while longer."""
    running = 'quire:num_requests_running{model_name="tickets/2"}'
    inside.post("/quire/load", json={"ref": "tickets/2"})
    assert running in versioned.http.get("/metrics").text
    inside.post("/quire/unload", json={"id": "tickets/2"})
    assert eventually(lambda: running not in versioned.http.get("/metrics").text)
    assert 'model_name="fake-echo"' in versioned.http.get("/metrics").text


def test_completions_are_those_of_the_engine_bit_for_bit(real_server: Any, real_inside: httpx.Client) -> None:
    llm = LLM.from_worker(real_server.worker)
    prompts = [[20, 21, 22], "the cat reads"]
    expected = llm.generate(prompts, GREEDY, use_tqdm=False)
    body = {"prompts": prompts, "params": codec.params_to_json(GREEDY)}
    answer = real_inside.post("/quire/generate", json=body).json()
    for told, own in zip(answer["completions"], expected, strict=True):
        found = codec.completion_from_json(told)
        assert (found.token_ids, found.text, found.logprobs) == (own.token_ids, own.text, own.logprobs)
        assert found.prompt_token_ids == own.prompt_token_ids
        assert found.e2e_ms >= (found.ttft_ms or 0) > 0
    chat = [[{"role": "user", "content": "the dog"}], [{"role": "user", "content": "a tree"}]]
    own_chat = llm.chat(chat, GREEDY, use_tqdm=False)
    body = {"messages": chat, "params": [codec.params_to_json(GREEDY)] * 2}
    told_chat = real_inside.post("/quire/chat", json=body).json()["completions"]
    assert [tuple(each["token_ids"]) for each in told_chat] == [own.token_ids for own in own_chat]
    texts = ["the small cat writes over the house", [20, 21, 22, 23]]
    scores = real_inside.post("/quire/score", json={"texts": texts}).json()["scores"]
    assert [codec.score_from_json(each) for each in scores] == llm.score(texts, use_tqdm=False)


def test_malformed_messages_are_refused(real_inside: httpx.Client) -> None:
    answer = real_inside.post("/quire/chat", json={"messages": [[{"content": "no role"}]]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0].role")


def test_records_are_those_of_the_requests(
    real_server: Any, real_inside: httpx.Client, eventually: Any
) -> None:
    last = real_server.worker.records.requests()
    since = last[-1].finished_ns + 1 if last else 0
    body = {"prompts": [[30 + i, 31, 32] for i in range(5)], "params": codec.params_to_json(GREEDY)}
    told = real_inside.post("/quire/generate", json=body).json()["completions"]

    def read() -> codec.Records:
        answer = real_inside.get("/quire/records", params={"since_ns": since})
        return codec.records_from_json(answer.json())

    assert eventually(lambda: len(read().requests) == 5)  # a record follows its last token
    records = read()
    assert {r.request_id for r in records.requests} == {each["request_id"] for each in told}
    assert all(len(r.token_ns) == 12 for r in records.requests)
    assert sum(step.num_decode_tokens for step in records.steps) >= 5 * 11


def test_a_client_that_leaves_aborts_its_requests(versioned: Any, eventually: Any) -> None:
    params = codec.params_to_json(replace(GREEDY, max_tokens=1500, logprobs=None))
    content = json.dumps({"prompts": [[1, 2, 3]] * 4, "params": params}).encode()
    host, port = versioned.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = (
        f"POST /quire/generate HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {versioned.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    assert eventually(lambda: versioned.worker.stats().num_running == 4)
    connection.close()
    assert eventually(lambda: versioned.worker.stats().num_running == 0, 3.0)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("load", {}, 400, "ref"),
        ("load", {"ref": 3}, 400, "ref"),
        ("load", {"ref": "tickets/1", "deterministic": "yes"}, 400, "deterministic"),
        ("load", {"ref": "tickets/1", "as_default": True}, 400, "as_default"),
        ("unload", {"id": "nobody"}, 404, "model"),
        ("generate", {"prompts": []}, 400, "prompts"),
        ("generate", {"prompts": ["a"], "model": "nobody"}, 404, "model"),
        ("generate", {"prompts": ["a"], "params": {"temprature": 1}}, 400, "temprature"),
        ("generate", {"prompts": ["a"], "params": {"temperature": -1}}, 400, "temperature"),
        ("generate", {"prompts": ["a", "b"], "params": [{}]}, 400, "params"),
        ("generate", {"prompts": [[999999]]}, 400, "prompt"),
        ("chat", {"messages": "hello"}, 400, "messages"),
        ("score", {"texts": None}, 400, "texts"),
    ],
)
def test_bad_input_is_refused_by_name(
    versioned: Any, inside: httpx.Client, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    answer = inside.post(f"/quire/{path}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
    assert param in (error["param"] or "")
    assert {"value", "limit", "remedy"} <= set(error)
    assert versioned.worker.stats().num_running == 0


def test_a_wrong_query_and_an_unknown_path_are_told(inside: httpx.Client) -> None:
    assert inside.get("/quire/records", params={"since_ns": "soon"}).status_code == 400
    assert inside.get("/quire/stats", params={"model": "nobody"}).status_code == 404
    missing = inside.get("/quire/nothing")
    assert (missing.status_code, missing.headers["content-type"]) == (404, "application/json")
    assert inside.get("/quire/load").status_code == 405
