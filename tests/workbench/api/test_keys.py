"""API keys with the official client: who gets in, what each right opens, what limits say, and that no key is ever told."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.errors import TypedError
from engine.sampling_params import SamplingParams
from workbench.access import keys
from workbench.access.keys import KeyLimits, NewKey
from workbench.access.principal import Right
from workbench.api.auth import RIGHTS, rights_for
from workbench.api.openapi import document
from workbench.backends.app import AppBackend
from workbench.host import fake_worker
from workbench.observe import request_reader
from workbench.run_state import RunningApp
from workbench.services import Services
from workbench.settings import Settings
from workbench.terminal_chat import ServerPartner

ASK = {"messages": [{"role": "user", "content": "Hello"}]}
Make = Callable[..., NewKey]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    made = Services(Settings(home_dir=tmp_path_factory.mktemp("keys")))
    made.open()
    yield made
    made.close()


@pytest.fixture(scope="module")
def guarded(serve: Any, services: Services) -> Iterator[Any]:
    """A server that asks for keys: one was made."""
    with serve(partial(fake_worker, delay_s=0.002), services=services) as running:
        yield running


@pytest.fixture(scope="module")
def make(services: Services) -> Make:
    """Makes a key that the server knows at once."""

    def made(*rights: Right, **limits: int) -> NewKey:
        assert services.store is not None
        assert services.keys is not None
        new = keys.create(services.store, "test", rights, KeyLimits(**limits))
        services.keys.refresh()
        return new

    return made


def client_of(server: Any, key: NewKey) -> openai.OpenAI:
    found: openai.OpenAI = server.openai.with_options(api_key=key.text)
    return found


def bearer(key: NewKey) -> dict[str, str]:
    return {"authorization": f"Bearer {key.text}"}


def test_without_keys_nobody_is_asked_and_with_the_setting_everybody_is(serve: Any, tmp_path: Path) -> None:
    for required, status in ((False, 200), (True, 401)):
        kept = Services(Settings(home_dir=tmp_path, require_key=required))
        kept.open()
        with serve(partial(fake_worker, delay_s=0.0), services=kept) as running:
            assert running.http.get("/v1/models").status_code == status
            assert running.http.get("/readyz").status_code == 200
        kept.close()


def test_the_official_client_gets_in_with_a_key_and_is_told_why_without(guarded: Any, make: Make) -> None:
    key = make(Right.INFER)
    client = client_of(guarded, key)
    model = client.models.list().data[0].id
    assert client.chat.completions.create(model=model, max_tokens=4, **ASK).usage.completion_tokens == 4
    chunks = list(client.chat.completions.create(model=model, max_tokens=4, stream=True, **ASK))
    assert chunks[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.openai.models.list()
    error = caught.value
    assert (error.status_code, error.code, error.response.headers["www-authenticate"]) == (
        401,
        "invalid_api_key",
        "Bearer",
    )
    assert "quire keys create" in str(error)


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer sk-quire-0123456789-x", "Basic x", "Bearer \xe9"]
)
def test_whatever_is_no_key_is_refused(guarded: Any, make: Make, given: str | None) -> None:
    make(Right.INFER)
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    answer = guarded.http.post("/v1/chat/completions", headers=headers, json=ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_every_documented_route_has_its_right_and_others_need_admin() -> None:
    open_to_all = {path for path in document()["paths"] if rights_for(path) is None}
    assert open_to_all == {"/healthz", "/health", "/readyz"}
    assert set(RIGHTS) <= set(document()["paths"])
    for path in ("/v1", "/v1/", "/v1/new", "/v1/chat/completions/", "/quire/load"):
        assert rights_for(path) == (Right.ADMIN,), path
    assert rights_for("/") is rights_for("/settings") is rights_for("/_stcore/stream") is None


@pytest.mark.parametrize(
    ("method", "path", "needed"),
    [
        ("POST", "/v1/completions", {Right.INFER}), ("POST", "/tokenize", {Right.INFER}),
        ("GET", "/v1/models", {Right.INFER, Right.READ}), ("GET", "/metrics", {Right.READ}),
        ("POST", "/v1/load_lora_adapter", set()), ("GET", "/v1/nothing", set()), ("POST", "/quire/generate", set()),
    ],
)  # fmt: skip
def test_each_right_opens_its_routes_and_admin_all(
    guarded: Any, make: Make, method: str, path: str, needed: set[Right]
) -> None:
    for right in Right:
        body = {} if method == "POST" else None
        answer = guarded.http.request(method, path, headers=bearer(make(right)), json=body)
        if right in needed or right is Right.ADMIN:
            assert answer.status_code != 401
            assert answer.status_code != 403 or "LORA" in answer.json()["error"]["param"]
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_right"), right


def test_the_apps_own_token_opens_everything(guarded: Any, make: Make) -> None:
    make(Right.INFER)
    headers = {"authorization": f"Bearer {guarded.token}"}
    for path in ("/v1/models", "/metrics", "/quire/residents"):
        assert guarded.http.get(path, headers=headers).status_code == 200, path
    assert guarded.http.get("/quire/residents").status_code == 401


def test_our_own_programs_come_with_the_environments_key_where_they_have_no_token(
    guarded: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = RunningApp(guarded.url, 1, "", guarded.model)
    monkeypatch.delenv("QUIRE_API_KEY", raising=False)
    with AppBackend(app) as backend, pytest.raises(TypedError, match="these routes need the app's token"):
        backend.residents()
    monkeypatch.setenv("QUIRE_API_KEY", make(Right.ADMIN).text)
    with AppBackend(app) as backend:
        assert len(backend.generate("abc", SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
    partner = ServerPartner(guarded.url)
    assert partner.name == guarded.model
    partner.close()


def test_a_revoked_key_is_out_within_a_second_and_is_told_so(
    guarded: Any, services: Services, make: Make
) -> None:
    key = make(Right.READ)
    assert guarded.http.get("/metrics", headers=bearer(key)).status_code == 200
    assert services.store is not None
    keys.revoke(services.store, key.key.id)
    time.sleep(1.0)
    answer = guarded.http.get("/metrics", headers=bearer(key))
    assert answer.status_code == 401
    assert f"{key.key.id} was revoked" in answer.text


def test_rates_are_told_in_headers_and_by_429(guarded: Any, make: Make) -> None:
    client = client_of(guarded, make(Right.INFER, requests_per_minute=2, tokens_per_minute=1000))
    answer = client.completions.with_raw_response.create(model=guarded.model, prompt="abc", max_tokens=5)
    rates = {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit")}
    assert rates["x-ratelimit-limit-requests"] == "2"
    assert rates["x-ratelimit-remaining-requests"] == "1"
    used = answer.parse().usage
    assert used is not None
    left = int(rates["x-ratelimit-remaining-tokens"])
    assert 1000 - used.total_tokens - 5 <= left < 1000
    client.completions.create(model=guarded.model, prompt="abc", max_tokens=5)
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=guarded.model, prompt="abc", max_tokens=5)
    response = caught.value.response
    assert (caught.value.code, caught.value.param) == ("rate_limit_exceeded", "requests_per_minute")
    assert 25 <= int(response.headers["retry-after"]) <= 30
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert client.models.list().data, "looking is not limited"


def test_tokens_are_settled_by_what_the_engine_used_whoever_leaves(
    guarded: Any, services: Services, make: Make, eventually: Any
) -> None:
    key = make(Right.INFER, daily_tokens=100_000)
    assert services.keys is not None
    meter = services.keys.meter
    client = client_of(guarded, key)
    two = client.completions.create(model=guarded.model, prompt=["abc", "defg"], n=2, max_tokens=3)
    assert two.usage is not None
    assert eventually(lambda: meter.used_today(key.key.id) == two.usage.total_tokens)
    stream = client.completions.create(
        model=guarded.model, prompt="abc", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert meter._states[key.key.id].num_reserved >= 1000
    stream.close()
    assert eventually(lambda: meter._states[key.key.id].num_reserved == 0)
    assert two.usage.total_tokens < meter.used_today(key.key.id) < two.usage.total_tokens + 900
    refused = guarded.http.post("/v1/completions", headers=bearer(key), json={"prompt": "x" * 20_000})
    assert refused.status_code == 400, "longer than the context: refused when its tokens are reserved"
    assert meter._states[key.key.id].num_reserved == 0


def test_requests_at_once_are_bounded(guarded: Any, services: Services, make: Make) -> None:
    key = make(Right.INFER, max_concurrent=1)
    assert services.keys is not None

    def ask() -> httpx.Response:
        answer: httpx.Response = guarded.http.post(
            "/v1/completions", headers=bearer(key), json={"prompt": "abc", "max_tokens": 1}
        )
        return answer

    services.keys.meter.enter(key.key)  # as a request that is being answered
    refused = ask()
    assert (refused.status_code, refused.json()["error"]["param"]) == (429, "max_concurrent")
    assert refused.headers["retry-after"] == "1"
    services.keys.meter.leave(key.key)
    assert [ask().status_code for _ in range(3)] == [200, 200, 200], "each gives its place back"


def test_a_request_counts_for_its_key_in_shares_and_log(guarded: Any, services: Services, make: Make) -> None:
    key = make(Right.INFER)
    answer = guarded.http.post(
        "/v1/chat/completions", headers=bearer(key), json={**ASK, "user": "ann", "max_tokens": 3}
    )
    name = answer.headers["x-request-id"]
    [record] = [each for each in guarded.worker.records.requests() if each.request_id == name]
    assert record.client == key.key.id
    rows = {row["request_id"]: row for row in request_reader.read(services.settings.home_dir).to_pylist()}
    assert rows[name]["key_id"] == key.key.id


def test_no_key_is_ever_told(
    guarded: Any,
    services: Services,
    make: Make,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A key in use, in wrong places and in errors: its secret is in no file under HOME_DIR, no log, no output, no answer."""
    caplog.set_level(logging.DEBUG)
    key = make(Right.INFER, max_concurrent=5)
    secret = key.text.rpartition("-")[2]
    told: list[str] = []

    def ask(path: str, body: dict[str, Any] | None = None, **headers: str) -> None:
        method = "GET" if body is None else "POST"
        told.append(guarded.http.request(method, path, json=body, headers={**bearer(key), **headers}).text)

    ask(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": f"my key is {key.text}"}], "max_tokens": 0},
    )
    ask("/v1/chat/completions", {**ASK, "temperature": "hot"})
    ask("/metrics")
    ask("/quire/load", {"ref": "x"})
    ask("/v1/models", authorization=f"Bearer {key.text}x")
    ask("/v1/models/none")
    assert services.store is not None
    assert services.keys is not None
    keys.revoke(services.store, key.key.id)
    services.keys.refresh()
    ask("/v1/models")
    ask("/v1/completions", {"prompt": "x"}, authorization=f"bearer {key.text}")
    services.keys.save()
    assert not [text for text in told if secret in text]
    out, err = capfd.readouterr()
    assert secret not in out + err + caplog.text
    time.sleep(0.6)  # the request log's journal is synced every half second
    for file in services.settings.home_dir.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file
    assert secret not in json.dumps(guarded.http.get("/healthz").json())
    assert secret not in Path("/proc/self/cmdline").read_text()


def test_keys_that_cannot_be_read_let_nobody_in(serve: Any, tmp_path: Path) -> None:
    kept = Services(Settings(home_dir=tmp_path))
    kept.open()
    assert kept.store is not None
    with kept.store.begin() as connection:
        connection.exec_driver_sql("DROP TABLE api_keys")
    with serve(partial(fake_worker, delay_s=0.0), services=kept) as running:
        answer = running.http.get("/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "keys_unavailable")
        assert answer.headers["retry-after"]
        assert running.http.get("/healthz").status_code == 200
    kept.close()


def test_many_readers_of_one_key_are_counted_once_each(guarded: Any, services: Services, make: Make) -> None:
    key = make(Right.INFER, requests_per_minute=20)
    answers: list[int] = []

    def ask() -> None:
        with httpx.Client(base_url=guarded.url, headers=bearer(key), verify=False) as http:
            for _ in range(10):
                answers.append(
                    http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code
                )

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 20 <= answers.count(200) <= 23
    assert answers.count(200) + answers.count(429) == 30
    assert services.keys is not None
    assert services.keys.meter._states[key.key.id].num_running == 0
