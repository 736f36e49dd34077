"""Clients that leave, steps that fail, engines that die: what the API says and what it leaves behind."""

from __future__ import annotations

import json
import socket
import threading
import time
from functools import partial
from typing import Any

import openai
import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineDeadError, ModelNotFoundError
from engine.fake_runner import FakeRunner, FakeTokenizer, scripted
from engine.plan import KVSpec
from engine.request import FinishReason
from engine.worker import EngineWorker
from workbench.host import HostPhase, fake_worker
from workbench.watchdog import Watchdog

USER = [
    {"role": "user", "content": "Hello there, this is a prompt of more than one block of sixteen tokens."}
]


def send_request(server: Any, stream: bool, **body: Any) -> socket.socket:
    """A raw connection with a chat request under way."""
    content = json.dumps({"messages": USER, "stream": stream, **body}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_blocks(serve: Any, eventually: Any, stream: bool, n: int) -> None:
    with serve(partial(fake_worker, delay_s=0.01)) as server:
        worker = server.worker
        connection = send_request(server, stream, max_tokens=1500, ignore_eos=True, n=n)
        if stream:
            assert b"200 OK" in connection.recv(4096)
        assert eventually(lambda: worker.stats().num_running == n)
        assert worker.stats().num_free_blocks < worker.stats().num_blocks
        connection.close()
        assert eventually(lambda: worker.stats().num_running == 0, 3.0)
        assert worker.stats().num_free_blocks == worker.stats().num_blocks
        assert eventually(lambda: len(worker.records.requests()) == n)  # a record follows the last token
        assert [r.finish_reason for r in worker.records.requests()] == [FinishReason.ABORT] * n
        assert all(r.num_output_tokens < 1500 for r in worker.records.requests())


def test_others_go_on_when_one_leaves(serve: Any, eventually: Any) -> None:
    with serve(partial(fake_worker, delay_s=0.005)) as server:
        leaver = send_request(server, True, max_tokens=1000, ignore_eos=True)
        assert eventually(lambda: server.worker.stats().num_running == 1)
        threading.Timer(0.1, leaver.close).start()
        answer = server.openai.chat.completions.create(model=server.model, messages=USER, max_tokens=60)
        assert answer.usage.completion_tokens == 60


def test_a_failed_step_is_told_and_the_server_goes_on(serve: Any, fault: Any) -> None:
    with serve(
        partial(fake_worker, delay_s=0.0, fail_at={0: RuntimeError("boom"), 8: RuntimeError("bang")})
    ) as server:
        whole = server.post(max_tokens=4)
        assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")
        assert "boom" in whole.json()["error"]["message"]
        chunks = []
        with pytest.raises(openai.APIError, match="bang") as caught:
            for chunk in server.openai.chat.completions.create(
                model=server.model, messages=USER, stream=True
            ):
                chunks.append(chunk)
        assert chunks, "the failure came after some tokens"
        assert server.post(max_tokens=4).status_code == 200
        assert server.http.get("/healthz").status_code == 200
        assert server.http.get("/readyz").status_code == 200
        assert [r.finish_reason.value for r in server.worker.records.requests()] == [
            "error",
            "error",
            "length",
        ]
        fault(
            "exception in a step", fails=f"the requests of that step, with the exception's text: {told(whole)}; one that streams gets "
            f"an error event `{caught.value.code}` after its tokens", goes_on="all others, recomputed where they were in flight; the "
            "next request succeeds", afterwards="failed requests are on the log with finish reason `error`",
        )  # fmt: skip


def told(response: Any) -> str:
    """Status and code of a refusal."""
    return f"{response.status_code} `{response.json()['error']['code']}`"


class Hanging(FakeRunner):
    """A runner whose steps do not return while `hangs` is set."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.hangs = threading.Event()
        self.released = threading.Event()

    def collect(self) -> Any:
        if self.hangs.is_set():
            self.released.wait(60)
        return super().collect()


def test_a_step_that_hangs_ends_its_requests_and_the_engine(serve: Any, eventually: Any, fault: Any) -> None:
    tokenizer = FakeTokenizer()
    runner = Hanging(64, choose=scripted("Hello " * 50), vocab_size=tokenizer.vocab_size)
    died: list[BaseException] = []

    def factory(config: Any, *, progress: Any, on_fatal: Any) -> EngineWorker:
        def fatal(error: BaseException) -> None:
            died.append(error)
            on_fatal(error)

        resolved = EngineConfig(model=config.model, num_blocks=64, max_model_len=512, max_batched_tokens=512)
        engine = Engine(
            resolved, runner, kv_spec=KVSpec(1, 1, 1, 16, 8), eos_token_ids=tokenizer.eos_token_ids,
            vocab_size=tokenizer.vocab_size, tokenizer=tokenizer,
        )  # fmt: skip
        return EngineWorker(engine, on_fatal=fatal)

    watchdog = Watchdog(0.5, first_step_s=30)
    with serve(factory) as server:
        watchdog.watch(server.worker)
        watchdog.start()
        try:
            assert server.post(max_tokens=4).status_code == 200
            time.sleep(0.7)
            assert server.http.get("/readyz").status_code == 200, "idle, however long"
            runner.hangs.set()
            whole: list[Any] = []
            asking = threading.Thread(target=lambda: whole.append(server.post(max_tokens=4)))
            asking.start()
            with pytest.raises(openai.APIError, match="no step succeeded for") as streamed:
                list(server.openai.chat.completions.create(model=server.model, messages=USER, stream=True))
            asking.join(20)
            assert "no step succeeded for" in whole[0].json()["error"]["message"]
            assert eventually(lambda: server.host.state().phase is HostPhase.FAILED)
            assert server.http.get("/readyz").status_code == 503
            late = server.post(max_tokens=4)
            assert [type(error) for error in died] == [EngineDeadError]
        finally:
            watchdog.close()
        begun = time.monotonic()
    assert time.monotonic() - begun < 5, "who closes a host waits for no step that hangs"
    runner.released.set()
    fault(
        "hang in a step", fails=f"after `QUIRE_STEP_TIMEOUT_SECONDS` everything of that engine: {told(whole[0])}, in a stream as an error "
        f"event `{streamed.value.code}`; newcomers until the restart: {told(late)}", goes_on="pages and probes, /readyz says 503; the "
        "log has the traceback of every thread", afterwards="the app leaves with the code of a dead engine and is started again",
    )  # fmt: skip


def test_a_dead_engine_is_unhealthy_and_refuses(serve: Any, eventually: Any) -> None:
    with serve(partial(fake_worker, delay_s=0.0, fail_at={0: EngineDeadError("device lost")})) as server:
        assert server.post(max_tokens=4).status_code in (500, 503)
        assert eventually(lambda: server.http.get("/healthz").status_code == 503)
        ready = server.http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
        refused = server.post(max_tokens=4)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")


def test_a_sleeping_engine_is_healthy_and_asks_to_try_again(serve: Any) -> None:
    with serve(partial(fake_worker, delay_s=0.0)) as server:
        server.worker.sleep()
        assert server.http.get("/healthz").status_code == 200
        refused = server.post(max_tokens=4)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_asleep")
        assert refused.headers["retry-after"]
        server.worker.wake_up()
        assert server.post(max_tokens=4).status_code == 200


def test_while_loading_it_is_alive_but_not_ready(serve: Any) -> None:
    gate, began = threading.Event(), threading.Event()

    def slow(config: Any, *, progress: Any, on_fatal: Any) -> Any:
        progress("Reading weights", 0.4)
        began.set()
        assert gate.wait(30)
        return fake_worker(config, on_fatal=on_fatal)

    with serve(slow, wait=False) as server:
        try:
            assert began.wait(30)
            alive, ready = server.http.get("/healthz"), server.http.get("/readyz")
            refused = server.http.post("/v1/chat/completions", json={"messages": USER})
        finally:
            gate.set()
        assert (alive.status_code, ready.status_code, refused.status_code) == (200, 503, 503)
        assert ready.json()["message"] == "Reading weights"
        assert refused.json()["error"]["code"] == "model_not_ready"
        assert "40%" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"]
        assert server.host.wait(30).ready
        assert server.http.get("/readyz").status_code == 200


def test_a_failed_load_says_why(serve: Any) -> None:
    def missing(config: Any, *, progress: Any, on_fatal: Any) -> Any:
        raise ModelNotFoundError("no model folder /nowhere", value="/nowhere", remedy="Name a folder.")

    with serve(missing, wait=False) as server:
        assert server.host.wait(10).error.value == "/nowhere"
        health = server.http.get("/healthz")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        refused = server.http.post("/v1/chat/completions", json={"messages": USER})
        assert refused.status_code == 503
        assert "/nowhere" in refused.json()["error"]["message"]
