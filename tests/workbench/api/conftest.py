"""A real server on a free loopback port, in a thread of the test process: sockets, HTTP and clients are the true ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import httpx
import pytest
import uvicorn
from jsonschema import Draft202012Validator
from openai import DefaultHttpxClient, OpenAI

from engine.config import EngineConfig
from engine.engine import Engine
from engine.fake_runner import FakeRunner, FakeTokenizer
from engine.plan import KVSpec
from engine.sampling_params import SamplingParams
from engine.worker import EngineWorker
from workbench.api.http_protocol import BoundedHttp
from workbench.api.metrics import EngineMetrics
from workbench.api.openapi import document
from workbench.app import Wiring, build_api_app
from workbench.host import EngineHost, WorkerFactory, fake_worker
from workbench.ports import bind
from workbench.services import Services
from workbench.settings import FAKE_MODEL, Settings


@dataclass(frozen=True)
class Server:
    url: str
    host: EngineHost
    http: httpx.Client
    openai: OpenAI
    token: str

    @property
    def worker(self) -> EngineWorker:
        return self.host.worker()

    @property
    def model(self) -> str:
        return self.host.models()[0].id

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        """A chat request with a valid model and message, `body` over it."""
        base: dict[str, Any] = {"model": self.model}
        if path.endswith("chat/completions"):
            base["messages"] = [{"role": "user", "content": "Hello"}]
        return self.http.post(path, json={**base, **body})


@cache
def _documented() -> dict[str, Any]:
    return document()


@cache
def _validator(path: str, method: str, status: int) -> Draft202012Validator | None:
    """Of the JSON answers of a documented route; None: the document names none."""
    made = _documented()
    answers = made["paths"][path][method]["responses"]
    assert str(status) in answers, f"{method} {path} answers {status}, which the document does not name"
    content = answers[str(status)]["content"]
    if "application/json" not in content:
        return None
    return Draft202012Validator({**content["application/json"]["schema"], "components": made["components"]})


def hold_against_document(response: httpx.Response) -> None:
    """Every answer of a documented route has a documented status and body. For clients' event hooks."""
    path, method = response.url.path, response.request.method.lower()
    if path.startswith("/v1/models/"):
        path = "/v1/models/{model_id}"
    if method not in _documented()["paths"].get(path, {}):
        return
    validator = _validator(path, method, response.status_code)
    if validator is None or response.headers["content-type"].startswith("text/event-stream"):
        return
    response.read()
    errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(response.json())]
    assert not errors, (path, response.status_code, errors[:3], response.text[:2000])


@contextmanager
def run_server(
    factory: WorkerFactory,
    config: EngineConfig | None = None,
    *,
    wait: bool = True,
    resolver: Any = None,
    services: Services | None = None,
    **settings: Any,
) -> Iterator[Server]:
    metrics = EngineMetrics()

    def ready(card: Any, worker: EngineWorker) -> None:
        metrics.watch(card, worker)
        if services is not None:
            services.attach(card, worker)

    given = services.settings if services else Settings(**settings)
    host = EngineHost(
        config or EngineConfig(model=FAKE_MODEL), factory=factory, resolver=resolver, on_ready=ready,
        on_closed=metrics.unwatch, splits=given.splits,
    )  # fmt: skip
    wiring = Wiring(given, host, metrics, services)
    app = build_api_app(wiring)
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="error",
            lifespan="on",
            timeout_graceful_shutdown=2,
            http=BoundedHttp,
            proxy_headers=False,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    # Plain HTTP: to read the system's certificates would take longer than most of these tests.
    hooks = {"response": [hold_against_document]}
    plain = DefaultHttpxClient(verify=False, event_hooks=hooks)
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60, http_client=plain)
    try:
        if wait:
            state = host.wait(120)
            assert state.ready, state.message
        with httpx.Client(base_url=url, timeout=60, verify=False, event_hooks=hooks) as http:
            yield Server(url, host, http, client, wiring.token)
    finally:
        client.close()
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server over FakeRunner, without delay."""
    with run_server(partial(fake_worker, delay_s=0.0)) as running:
        yield running


class ScriptTokenizer(FakeTokenizer):
    """FakeTokenizer with the markers of calls and reasoning as tokens; its template is what a test says it is."""

    SPECIAL = (
        *FakeTokenizer.SPECIAL, "<|tool_call|>", "<|/tool_call|>", "<tool_call>", "</tool_call>", "<think>", "</think>",
    )  # fmt: skip
    opens_reasoning = (
        False  # the template writes <think> at the end of prompts, unless enable_thinking is false
    )
    closes_reasoning = False  # the template writes reasoning that is empty

    def apply_chat_template(self, *given: Any, chat_template_kwargs: Any = None, **more: Any) -> list[int]:
        ids = super().apply_chat_template(*given, chat_template_kwargs=chat_template_kwargs, **more)
        opens = self.opens_reasoning and (chat_template_kwargs or {}).get("enable_thinking", True)
        written = "<think>\n" if opens else "<think>\n\n</think>\n\n" if self.closes_reasoning else ""
        return [*ids, *self.encode(written)]


class Script:
    """A server whose model answers what a test says, in the format that its template has."""

    def __init__(self) -> None:
        self.tokenizer = ScriptTokenizer()
        self.runner = FakeRunner(256, choose=self._token, vocab_size=self.tokenizer.vocab_size)
        self.server: Any = None
        self.says("")

    def says(self, answer: str, template: str | None = None, *, opens_reasoning: bool = False) -> None:
        self._ids = [*self.tokenizer.encode(answer), self.tokenizer.EOS]
        self.tokenizer.chat_template = template
        self.tokenizer.opens_reasoning, self.tokenizer.closes_reasoning = opens_reasoning, False

    def _token(self, request_id: str, index: int) -> int:
        return self._ids[min(index, len(self._ids) - 1)]

    def worker(self, config: EngineConfig, **hooks: Any) -> EngineWorker:
        resolved = EngineConfig(
            model=config.model, num_blocks=256, max_model_len=2048, max_batched_tokens=2048, num_threads=1
        )
        engine = Engine(
            resolved, self.runner, kv_spec=KVSpec(1, 1, 1, 16, 8), eos_token_ids=self.tokenizer.eos_token_ids,
            vocab_size=self.tokenizer.vocab_size, tokenizer=self.tokenizer,
        )  # fmt: skip
        return EngineWorker(engine, on_fatal=hooks.get("on_fatal"))

    def ask(self, **body: Any) -> Any:
        """A chat completion of the official client."""
        body.setdefault("messages", [{"role": "user", "content": "Hello"}])
        return self.server.openai.chat.completions.create(model=self.server.model, **body)

    def last_params(self) -> SamplingParams:
        """Of the request that was admitted last."""
        return next(plan.admitted[-1].params for plan in reversed(self.runner.plans) if plan.admitted)


@pytest.fixture(scope="module")
def script() -> Iterator[Script]:
    made = Script()
    with run_server(made.worker) as made.server:
        yield made


@pytest.fixture(scope="session")
def real_server(tiny_model: Any) -> Iterator[Server]:
    """A server over the real engine with the tiny model."""
    from workbench.host import load_worker

    config = EngineConfig(model=str(tiny_model), dtype="float32", device="cpu", num_blocks=512, num_threads=1)
    with run_server(load_worker, config) as running:
        yield running


@pytest.fixture(scope="session")
def serve() -> Callable[..., Any]:
    """`run_server`, for tests that need a server of their own."""
    return run_server


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Whether `condition` came true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="session")
def eventually() -> Callable[..., bool]:
    return wait_until
