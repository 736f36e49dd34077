"""Two instances behind a third: room and prefixes decide who answers, a drained one gets nothing, a lost one is survived."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, OpenAI

from workbench.access.principal import SCOPE_KEY, Principal, Right
from workbench.api.load import LoadRoutes
from workbench.api.metrics import EngineMetrics
from workbench.backends.endpoints import Endpoints, endpoint
from workbench.errors import SettingsError
from workbench.fleet.router import CHUNK_CHARS, NoInstanceError, Router, prefix_of
from workbench.fleet.routes import parse_routes
from workbench.fleet.status import DRAINING, READY, Status
from workbench.host import fake_worker
from workbench.ports import bind
from workbench.services import Services
from workbench.settings import Settings

LONG = "word " * 200  # several chunks of a prefix


class Cable:
    """The connection to an instance; cut, everything on it breaks at once, as when the instance is killed."""

    def __init__(self, url: str) -> None:
        self._to = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._listener = bind("127.0.0.1", 0)
        self._listener.listen()
        self._open: list[socket.socket] = []
        self.is_cut = False
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.is_cut = True
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.is_cut, self._open = False, []

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.is_cut:
                near.close()
                continue
            far = socket.create_connection(self._to)
            self._open += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        source.close()


@dataclass
class Fleet:
    one: Any
    two: Any
    front: Any
    cables: dict[str, Cable]
    settings: Settings

    def ask(self, content: str, client: OpenAI | None = None, **more: Any) -> tuple[str, str]:
        """Who answered, and what."""
        body = {"model": "chat", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **more}
        raw = (client or self.front.openai).chat.completions.with_raw_response.create(**body)
        return raw.headers["x-quire-instance"], raw.parse().choices[0].message.content


@pytest.fixture(scope="module")
def fleet(serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    home = tmp_path_factory.mktemp("fleet") / "home"
    settings = Settings(
        home_dir=home, follow="", demo=False, routes="chat=endpoint:one/fake-echo,endpoint:two/fake-echo"
    )
    services = Services(settings)
    services.open()
    with (
        serve(partial(fake_worker, delay_s=0.005, answer="from one " * 40)) as one,
        serve(partial(fake_worker, delay_s=0.005, answer="from two " * 40)) as two,
    ):
        cables = {"one": Cable(one.url), "two": Cable(two.url)}
        assert services.store is not None
        for name, cable in cables.items():
            Endpoints(services.store).add(endpoint(name, cable.url, kind="quire"))
        with serve(partial(fake_worker, delay_s=0.0), services=services) as front:
            yield Fleet(one, two, front, cables, settings)
        for cable in cables.values():
            cable.close()


def test_the_openai_client_is_answered_through_the_route(fleet: Fleet) -> None:
    who, text = fleet.ask("Hello")
    assert text.startswith(f"from {who}"[:8])
    stream = fleet.front.openai.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": "Hi"}], max_tokens=20, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text.startswith("from ")
    assert chunks[-1].usage.completion_tokens == 20
    ids = [each.id for each in fleet.front.openai.models.list().data]
    assert "chat" in ids
    assert fleet.front.http.get("/v1/models/chat").json()["route"] == [
        "endpoint:one/fake-echo",
        "endpoint:two/fake-echo",
    ]
    local = fleet.front.post(max_tokens=4)
    assert (local.status_code, "x-quire-instance" in local.headers) == (200, False)
    assert fleet.front.post(model="none").status_code == 404
    assert fleet.front.post(model="chat", temperature=-1).status_code == 400, (
        "an instance's refusal is passed on"
    )
    assert (
        fleet.front.http.post(
            "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}
        ).status_code
        == 400
    )


def test_what_begins_alike_goes_where_it_is_cached_and_the_rest_where_there_is_room(fleet: Fleet) -> None:
    for attempt in range(3):  # on a busy machine a reading that comes late has an instance rest for a second
        texts = [f"{attempt} {i} {LONG}" for i in range(4)]
        holders = [fleet.ask(text)[0] for text in texts]
        again = [[fleet.ask(f"{text} and more, number {j}")[0] for text in texts] for j in range(2)]
        if set(holders) == {"one", "two"} and again == [holders, holders]:
            return
        time.sleep(1.5)
    assert set(holders) == {"one", "two"}, "equally free: in turn"
    assert again == [holders, holders]


def test_a_clients_timeout_goes_with_its_request_and_is_no_fault_of_the_instance(fleet: Fleet) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 300}

    def ask(timeout_ms: int) -> httpx.Response:
        headers = {"x-request-timeout-ms": str(timeout_ms)}
        return fleet.front.http.post("/v1/chat/completions", json=body, headers=headers)

    cut = ask(200).json()
    assert cut["choices"][0]["stop_reason"] == "timeout"
    assert 0 < cut["usage"]["completion_tokens"] < 300
    late = [ask(1) for _ in range(3)]
    assert 408 in {each.status_code for each in late}, "none was late: the test proves nothing"
    assert {fleet.ask(f"after {i}")[0] for i in range(4)} == {"one", "two"}
    assert ask(0).status_code == 400


def test_a_drained_instance_gets_nothing_and_what_runs_there_goes_on(fleet: Fleet, eventually: Any) -> None:
    one = fleet.one
    with one.openai.chat.completions.create(
        model=one.model, messages=[{"role": "user", "content": "x"}], max_tokens=200, stream=True
    ) as running:
        next(running)
        assert eventually(lambda: one.http.get("/load").json()["running"] == 1)  # 50 ms behind at most
        assert one.http.post("/drain").json() == {"status": "draining", "server_load": 1}
        try:
            assert (one.http.get("/readyz").status_code, one.http.get("/healthz").status_code) == (503, 200)
            refused = one.post()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
            assert refused.headers["retry-after"]
            assert eventually(lambda: fleet.ask("x")[0] == "two")
            assert {fleet.ask(f"{i} {LONG}")[0] for i in range(4)} == {"two"}
            assert sum(1 for _ in running) > 100, "the running answer is not cut"
        finally:
            assert one.http.post("/resume").json()["status"] == "serving"
    load = one.http.get("/load").json()
    assert (load["ready"], load["draining"], load["server_load"]) == (True, False, 0)
    assert load["free_blocks"] == load["num_blocks"]
    assert eventually(lambda: fleet.ask("back")[0] == "one")


def test_an_instance_that_is_killed_is_told_in_mid_stream_and_survived_before(
    fleet: Fleet, eventually: Any
) -> None:
    raw = fleet.front.openai.chat.completions.with_raw_response.create(
        model="chat", messages=[{"role": "user", "content": "x"}], max_tokens=300, stream=True
    )  # fmt: skip
    who = raw.headers["x-quire-instance"]
    other = "two" if who == "one" else "one"
    stream = iter(raw.parse())
    got = [next(stream) for _ in range(5)]
    fleet.cables[who].cut()
    try:
        with pytest.raises(APIError, match="broke off in the middle"):
            got.extend(stream)
        assert len(got) < 300
        for i in range(6):
            assert fleet.ask(f"{i}")[0] == other, "who does not answer is not waited for"
        fleet.cables[other].cut()
        everyone_gone = fleet.front.post(model="chat")
        assert everyone_gone.status_code == 503
        assert everyone_gone.headers["retry-after"]
    finally:
        for cable in fleet.cables.values():
            cable.mend()
    assert eventually(lambda: {fleet.ask(str(i))[0] for i in range(4)} == {"one", "two"})


def test_a_client_that_leaves_is_left_by_the_instance(fleet: Fleet, eventually: Any) -> None:
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1900,
        "stream": True,
    }
    with (
        httpx.Client(base_url=fleet.front.url, verify=False) as client,
        client.stream("POST", "/v1/chat/completions", json={**body, "ignore_eos": True}) as answer,
    ):
        next(answer.iter_lines())
        busy = fleet.one if answer.headers["x-quire-instance"] == "one" else fleet.two
        assert eventually(lambda: busy.http.get("/load").json()["running"] == 1)
    assert eventually(lambda: busy.http.get("/load").json()["server_load"] == 0, 5.0), (
        "half the time of 1900 tokens of 5 ms"
    )


def test_a_page_stops_an_endpoints_answer_at_once_and_keeps_what_came(fleet: Fleet, eventually: Any) -> None:
    from engine.request import FinishReason
    from engine.sampling_params import SamplingParams
    from workbench.ui.answers import Answer, Begun
    from workbench.ui.endpoint_stream import EndpointStream

    there = endpoint("one", fleet.one.url, kind="quire")
    params = SamplingParams(max_tokens=1900, ignore_eos=True, logprobs=0)

    def begin(request_id: str) -> Begun:
        asked = [{"role": "user", "content": "x"}]
        stream = EndpointStream(there, "endpoint:one/fake-echo", asked, params, request_id=request_id)
        return Begun(stream, stream, stream)

    answer = Answer(begin, params)
    assert eventually(lambda: "from one" in answer.text)
    answer.stop(wait_s=2.0)
    assert not answer.running
    assert answer.completion is not None
    assert (answer.completion.finish_reason, answer.error) == (FinishReason.ABORT, None)
    assert answer.output.content.startswith("from one")
    assert eventually(lambda: fleet.one.http.get("/load").json()["server_load"] == 0, 5.0)


def test_only_who_may_administer_can_drain(fleet: Fleet) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Route
    from starlette.testclient import TestClient

    from workbench.api.errors import on_typed_error
    from workbench.errors import WorkbenchError

    routes = LoadRoutes(fleet.one.host, EngineMetrics())
    inner = Starlette(
        routes=[Route("/drain", routes.drain, methods=["POST"])], exception_handlers={WorkbenchError: on_typed_error}
    )  # fmt: skip

    async def as_reader(scope: Any, receive: Any, send: Any) -> None:
        await inner(
            {**scope, SCOPE_KEY: Principal("k1", frozenset({Right.INFER, Right.READ}))}, receive, send
        )

    assert TestClient(as_reader).post("/drain").status_code == 403
    assert fleet.one.host.is_draining is False


# ── the choice by itself ────────────────────────────────────────────────────────────────────────────────────────────────

ROUTE = parse_routes("r=endpoint:a/m,endpoint:b/m,endpoint:c/m")[0]


def ready(running: int, slots: int | None = 4, waiting: int = 0) -> Status:
    return Status(READY, ("m",), running=running, waiting=waiting, max_num_seqs=slots)


def test_the_freest_is_first_and_what_was_sent_since_a_reading_counts() -> None:
    router = Router([ROUTE])
    for name, running in (("a", 3), ("b", 1), ("c", 2)):
        router.told(name, ready(running))
    names = [target.endpoint for target in router.order(ROUTE, [])]
    assert names == ["b", "c", "a"]
    b = ROUTE.targets[1]
    router.began(b, [])
    router.began(b, [])
    assert router.order(ROUTE, [])[0].endpoint == "c"
    router.ended(b)
    router.ended(b)
    assert router.order(ROUTE, [])[0].endpoint == "b"
    router.told("b", ready(0, slots=None))
    assert router.order(ROUTE, [])[0].endpoint == "b", "a server that tells no slots is taken to have some"


def test_a_prefix_draws_as_long_as_a_slot_is_free_there() -> None:
    router = Router([ROUTE])
    for name in "abc":
        router.told(name, ready(0))
    a = ROUTE.targets[0]
    prefix = prefix_of("x" * CHUNK_CHARS * 3)
    longer = prefix_of("x" * CHUNK_CHARS * 3 + "y" * CHUNK_CHARS)
    assert (len(prefix), longer[:3] == prefix, prefix_of("short")) == (3, True, [])
    router.began(a, prefix)
    router.told("a", ready(3))
    assert router.order(ROUTE, longer)[0] == a
    router.told("a", ready(4))
    assert router.order(ROUTE, longer)[0] != a, "computing a prefix again costs less than waiting"


def test_who_fails_rests_longer_each_time_and_who_drains_gets_nothing() -> None:
    now = [100.0]
    router = Router([ROUTE], clock=lambda: now[0])
    for name in "abc":
        router.told(name, ready(0))
    router.failed("a", "gone")
    assert [t.endpoint for t in router.order(ROUTE, [])][-1] == "a"
    router.failed("a", "gone")
    now[0] += 1.5
    assert [t.endpoint for t in router.order(ROUTE, [])][-1] == "a", "the second rest is longer"
    now[0] += 1.0
    assert router.order(ROUTE, [])[0].endpoint == "a"
    for name in "abc":
        router.told(name, Status(DRAINING))
    with pytest.raises(NoInstanceError, match="a: draining"):
        router.order(ROUTE, [])


@pytest.mark.parametrize("text", ["r", "r=", "r=a/m", "r=endpoint:a", "r=endpoint:a/", "r=endpoint:a/m,endpoint:a/m", "/=endpoint:a/m",
                                  "r=endpoint:a/m;r=endpoint:b/m"])  # fmt: skip
def test_routes_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_routes(text)
    assert (caught.value.param, caught.value.value) == ("QUIRE_ROUTES", text)


def test_a_name_is_routed_or_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from workbench import settings

    monkeypatch.setenv("QUIRE_ROUTES", "chat=endpoint:a/m")
    monkeypatch.setenv("QUIRE_SPLIT", "chat=x:1")
    with pytest.raises(SettingsError, match="both name 'chat'"):
        settings.load(home_dir=tmp_path)


@pytest.mark.full
def test_a_benchmark_loads_an_endpoint_with_this_clients_clock(fleet: Fleet) -> None:
    from workbench.bench import spec as spec_module
    from workbench.bench.errors import BenchmarkError
    from workbench.bench.run import run_benchmark

    given = {
        "model": "endpoint:one/fake-echo",
        "requests": 4,
        "concurrency": 2,
        "input_tokens": 40,
        "output_tokens": 8,
        "warmup": 0,
    }
    finished = run_benchmark(spec_module.parse(given), fleet.settings, track=False)
    record = finished.record
    assert (record.figures["num_ok"], record.engine, record.target["url"]) == (
        4,
        None,
        f"{fleet.cables['one'].url}/v1",
    )
    assert record.figures["ttft_ms"]["p50"] > 0
    assert record.figures["tpot_ms"]["p50"] > 0
    with pytest.raises(BenchmarkError, match="leave url out"):
        spec_module.parse({**given, "url": "http://x"})
