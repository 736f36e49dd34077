"""More requests than a server can take: what is refused, how, and that the others are served."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
import pytest

from engine.config import EngineConfig
from engine.errors import QueueFullError
from engine.llm import LLM
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from workbench.api.generation import GenerationResponse, submit_choices
from workbench.api.wire import CompletionWire, Head
from workbench.backends.app import AppBackend
from workbench.host import fake_worker
from workbench.run_state import RunningApp
from workbench.settings import FAKE_MODEL

LONG = {"max_tokens": 1500, "ignore_eos": True}


def small(**settings: Any) -> EngineConfig:
    """An engine that runs one request at a time."""
    return EngineConfig(model=FAKE_MODEL, max_num_seqs=1, **settings)


@pytest.fixture
def busy(serve: Any, eventually: Any) -> Iterator[Any]:
    """A server whose row is taken and whose queue has room for two requests, of which one waits."""
    config = small(max_queued_requests=2)
    with serve(partial(fake_worker, delay_s=0.01), config) as server:
        params = SamplingParams(max_tokens=1500, ignore_eos=True)
        running = server.worker.submit([1, 2, 3], params)
        assert eventually(lambda: server.worker.stats().num_running == 1)
        server.worker.submit([1, 2, 3], params)
        assert eventually(lambda: server.worker.stats().num_waiting == 1)
        yield server
        running.abort()


def test_beyond_the_queue_it_is_429_with_when_to_come_again(busy: Any) -> None:
    refused = busy.post(max_tokens=4, n=2)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    with pytest.raises(openai.RateLimitError):
        busy.openai.completions.create(model=busy.model, prompt=["a", "b"], max_tokens=4)
    streamed = busy.post(max_tokens=4, n=2, stream=True)
    assert (streamed.status_code, streamed.json()["error"]["code"]) == (429, "queue_full")


def test_of_a_refused_request_nothing_is_queued(busy: Any) -> None:
    assert busy.post(max_tokens=4, n=2).status_code == 429
    assert busy.worker.num_live == 2
    assert busy.worker.num_refused == 2
    metrics = busy.http.get("/metrics").text
    assert f'quire:num_requests_refused_total{{model_name="{busy.model}"}} 2.0' in metrics
    assert f'quire:num_requests_waiting{{model_name="{busy.model}"}} 1.0' in metrics


def test_what_fits_still_waits_and_is_served(busy: Any, eventually: Any) -> None:
    stream = busy.worker.submit([1, 2], SamplingParams(max_tokens=2))
    for request_id in busy.worker._hub.ids():
        if request_id != stream.request_id:
            busy.worker.abort(request_id)
    assert stream.result(20).num_output_tokens == 2
    assert busy.post(max_tokens=2).status_code == 200


def test_programs_of_this_machine_get_the_typed_error(busy: Any) -> None:
    with pytest.raises(QueueFullError) as caught:
        LLM.from_worker(busy.worker).generate([[1], [2]], SamplingParams(max_tokens=4), use_tqdm=False)
    assert caught.value.retry_after_s >= 1
    refused = busy.http.post(
        "/quire/generate", json={"prompts": ["a", "b"]}, headers={"authorization": f"Bearer {busy.token}"}
    )
    assert (refused.status_code, refused.json()["error"]["limit"]) == (429, 2)
    assert busy.worker.num_live == 2


def test_a_program_that_asks_the_app_comes_again_when_there_is_room(serve: Any) -> None:
    with serve(partial(fake_worker, delay_s=0.01), small(max_queued_requests=1)) as server:
        app = RunningApp(server.url, os.getpid(), "", server.model, server.token)
        with AppBackend(app) as backend:
            found = backend.generate([[i] for i in range(4)], SamplingParams(max_tokens=10, ignore_eos=True))
        assert [each.num_output_tokens for each in found] == [10] * 4
        assert server.worker.num_refused > 0, "nothing was ever refused: the test proves nothing"


@pytest.mark.parametrize("stream", [True, False])
def test_who_waits_too_long_gets_503_and_may_come_again(serve: Any, eventually: Any, stream: bool) -> None:
    with serve(partial(fake_worker, delay_s=0.01), small(max_queue_seconds=0.2)) as server:
        running = server.worker.submit([1, 2, 3], SamplingParams(max_tokens=1500, ignore_eos=True))
        assert eventually(lambda: server.worker.stats().num_running == 1)
        late = server.post(max_tokens=4, stream=stream)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
        assert late.headers["retry-after"]
        counted = f'finished_reason="timeout",model_name="{server.model}"}} 1.0'
        assert eventually(lambda: counted in server.http.get("/metrics").text)  # records follow the answer
        running.abort()
        assert running.result(20).finish_reason is FinishReason.ABORT
        assert server.post(max_tokens=2, stream=stream).status_code == 200


# ── timeouts of requests' own ───────────────────────────────────────────────────────────────────────────────────────

SHORT = {"x-request-timeout-ms": "150"}


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_waits_at_its_timeout_gets_408(busy: Any, stream: bool) -> None:
    body = {"model": busy.model, "prompt": "a", "max_tokens": 4, "stream": stream}
    late = busy.http.post("/v1/completions", json=body, headers=SHORT)
    assert (late.status_code, late.json()["error"]["code"]) == (408, "request_timeout")
    assert "its 0.15 s were over while it waited" in late.json()["error"]["message"]
    assert busy.worker.num_live == 2  # those without a timeout


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_runs_at_its_timeout_is_answered_with_what_there_is(
    serve: Any, path: str, stream: bool
) -> None:
    inputs = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]}, "/v1/responses": {"input": "a"}
    }  # fmt: skip
    with serve(partial(fake_worker, delay_s=0.01), small()) as server:
        body = {
            "model": server.model,
            "stream": stream,
            "ignore_eos": True,
            **inputs.get(path, {"prompt": "a"}),
        }
        body["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = 1500
        cut = server.http.post(path, json=body, headers=SHORT)
        [record] = server.worker.records.requests()
    assert cut.status_code == 200
    assert record.finish_reason is FinishReason.TIMEOUT
    assert 0 < record.num_output_tokens < 1500
    if path == "/v1/responses":
        assert '"max_output_tokens"' in cut.text
        assert '"incomplete"' in cut.text
    elif stream:
        assert '"finish_reason":"length","stop_reason":"timeout"' in cut.text
        assert '"error"' not in cut.text
    else:
        [choice] = cut.json()["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "timeout")
        assert cut.json()["usage"]["completion_tokens"] == record.num_output_tokens


def test_an_embedding_that_waits_at_its_timeout_gets_408(busy: Any) -> None:
    late = busy.http.post("/v1/embeddings", json={"model": busy.model, "input": "a"}, headers=SHORT)
    assert (late.status_code, late.json()["error"]["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "soon", "", "86400001", "1e3", "٣"])
def test_a_timeout_that_is_none_is_refused_by_name(server: Any, given: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank"):
        refused = server.http.post(
            path, json={"model": server.model}, headers=[(b"x-request-timeout-ms", given.encode())]
        )
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-request-timeout-ms")
    assert server.worker.num_live == 0


def test_priority_and_end_user_reach_the_queue(busy: Any, eventually: Any) -> None:
    body = {"max_tokens": 2, "priority": -3, "user": "ann", "stream": True}
    asked = threading.Thread(target=lambda: busy.post(**body))
    asked.start()
    assert eventually(lambda: busy.worker.stats().num_waiting == 2)
    head = busy.worker._engine._scheduler.waiting.head
    assert (head.request.priority, head.request.client) == (-3, "ann")
    busy.worker.abort(head.request_id)
    asked.join(20)


def test_a_priority_out_of_range_is_refused_by_name(server: Any) -> None:
    for priority in (2**31, 1.5, "high"):
        refused = server.post(priority=priority, max_tokens=2)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")


def test_settings_of_the_app_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench import settings

    monkeypatch.setenv("QUIRE_MAX_QUEUED_REQUESTS", "7")
    monkeypatch.setenv("QUIRE_MAX_QUEUE_SECONDS", "2.5")
    monkeypatch.setenv("QUIRE_CLIENT_WEIGHTS", json.dumps({"ann": 2}))
    config = settings.load().engine_config()
    assert (config.max_queued_requests, config.max_queued_tokens) == (7, "auto")
    assert (config.max_queue_seconds, config.client_weights) == (2.5, {"ann": 2.0})


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_that_stops_refuses_newcomers_and_lets_the_others_end(serve: Any, eventually: Any) -> None:
    with serve(partial(fake_worker, delay_s=0.02)) as server:
        worker = server.worker
        running = worker.submit([1, 2, 3], SamplingParams(max_tokens=60, ignore_eos=True))
        stopping = threading.Thread(target=server.host.stop_serving, args=(30.0, threading.Event()))
        stopping.start()
        assert eventually(lambda: server.host.is_stopping)
        body = {"messages": [{"role": "user", "content": "a"}]}
        refused = server.http.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
        assert refused.headers["retry-after"]
        assert server.http.get("/readyz").status_code == 503
        assert server.http.get("/healthz").status_code == 200
        stopping.join(20)
        assert not stopping.is_alive()
        assert running.result(1).finish_reason is FinishReason.LENGTH
        assert worker.num_live == 0


@pytest.mark.parametrize("stream", [True, False])
def test_after_the_grace_requests_end_with_the_reason(serve: Any, eventually: Any, stream: bool) -> None:
    answers: list[Any] = []
    with serve(partial(fake_worker, delay_s=0.01)) as server:
        worker = server.worker
        asked = threading.Thread(target=lambda: answers.append(server.post(stream=stream, **LONG)))
        asked.start()
        assert eventually(lambda: worker.stats().num_running == 1)
        server.host.stop_serving(0.1, threading.Event())
        asked.join(20)
        assert answers[0].status_code == (200 if stream else 503)
        assert "the server is stopping" in answers[0].text
        assert eventually(lambda: [r.error for r in worker.records.requests()] == ["the server is stopping"])


@pytest.mark.parametrize("fails", [False, True])
def test_what_came_while_the_server_was_busy_goes_out_in_one_write(fails: bool) -> None:
    """The event loop begins to read when the engine has written everything."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def answer() -> None:
        response = GenerationResponse(
            choices, wire, request_id="late", stream=True, include_usage=False, stalled_after_s=5
        )
        await asyncio.wait_for(response({"type": "http"}, receive, send), 10)

    worker = fake_worker(
        delay_s=0.0, answer="0123456789", fail_at={6: RuntimeError("a kernel raised")} if fails else None
    )
    worker.start()
    try:
        choices = submit_choices(worker, [[1, 2, 3]], SamplingParams(max_tokens=10), request_id="late")
        choices[0].stream.wait(10)
        wire = CompletionWire(
            Head("cmpl-late", 0, "m"), worker.tokenizer.token_text, num_logprobs=None, include_usage=False
        )
        asyncio.run(answer())
    finally:
        worker.close()
    bodies = [message["body"] for message in sent if message["type"] == "http.response.body"]
    assert len(bodies) == 2  # the end of a stream comes by itself
    events = [json.loads(event.removeprefix(b"data: ")) for event in bodies[0].split(b"\n\n") if event]
    told = "".join(choice["text"] for event in events for choice in event.get("choices", ()))
    assert told == ("012345" if fails else "0123456789")
    assert ("error" in events[-1]) == fails


# ── slow readers ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_client_that_reads_nothing_is_cut_and_its_request_ends(eventually: Any) -> None:
    """The third message is never taken, as when the connection's buffers are full."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 3:
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def answer() -> None:
        params = SamplingParams(max_tokens=1500, ignore_eos=True)
        choices = submit_choices(worker, [[1, 2, 3]], params, request_id="slow")
        head = Head("cmpl-slow", 0, "m")
        wire = CompletionWire(head, worker.tokenizer.token_text, num_logprobs=None, include_usage=False)
        response = GenerationResponse(
            choices, wire, request_id="slow", stream=True, include_usage=False, stalled_after_s=0.2
        )
        await asyncio.wait_for(response({"type": "http"}, receive, send), 10)

    worker = fake_worker(delay_s=0.01)
    worker.start()
    try:
        asyncio.run(answer())
        assert len(sent) == 3
        assert eventually(
            lambda: [r.finish_reason for r in worker.records.requests()] == [FinishReason.ABORT]
        )
    finally:
        worker.close()
