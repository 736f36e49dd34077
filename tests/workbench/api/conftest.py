"""A real server on a free loopback port, in a thread of the test process: sockets, HTTP and clients are the true ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

from engine.config import EngineConfig
from engine.worker import EngineWorker
from workbench.api.metrics import EngineMetrics
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

    host = EngineHost(
        config or EngineConfig(model=FAKE_MODEL), factory=factory, resolver=resolver, on_ready=ready,
        on_closed=metrics.unwatch,
    )  # fmt: skip
    wiring = Wiring(services.settings if services else Settings(**settings), host, metrics, services)
    app = build_api_app(wiring)
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    try:
        if wait:
            state = host.wait(120)
            assert state.ready, state.message
        with httpx.Client(base_url=url, timeout=60) as http:
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
