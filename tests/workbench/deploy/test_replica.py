"""One replica without Ray: the API answers calls as it answers sockets, and who leaves aborts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from workbench.deploy.replica import EngineReplica
from workbench.deploy.wire import AnswerStart, HttpRequest

HEADERS = (("host", "127.0.0.1"), ("content-type", "application/json"))


def ask(**fields: object) -> HttpRequest:
    body = {"model": "fake-echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, **fields}
    return HttpRequest("POST", "/v1/chat/completions", "", HEADERS, json.dumps(body).encode())


def test_whole_answers_streams_errors_and_leaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME_DIR", str(tmp_path))
    monkeypatch.setenv("QUIRE_FAKE", "1")

    async def use() -> None:
        replica = EngineReplica.__new__(EngineReplica)
        await replica.__init__({})  # type: ignore[misc]  # as Ray makes it
        try:
            [whole] = [part async for part in replica.forward(ask())]
            assert isinstance(whole, AnswerStart)
            assert (whole.status, whole.is_stream) == (200, False)
            assert json.loads(whole.body)["usage"]["completion_tokens"] == 5

            start, *parts = [part async for part in replica.forward(ask(stream=True))]
            assert isinstance(start, AnswerStart)
            assert start.is_stream
            assert b"".join(part for part in parts if isinstance(part, bytes)).endswith(b"data: [DONE]\n\n")

            [refused] = [part async for part in replica.forward(ask(max_tokens=-1))]
            assert isinstance(refused, AnswerStart)
            assert refused.status == 400

            leaving = replica.forward(ask(stream=True, max_tokens=150))
            await anext(leaving)
            await leaving.aclose()
            worker = replica._host.worker()
            while sum(worker.stats().finished.values()) < 3:
                await asyncio.sleep(0.01)
            assert worker.stats().finished["abort"] == 1, "it went on for nobody"
            stats = replica.record_routing_stats()
            assert stats["num_requests"] == 0
            assert stats["num_slots"] == 256
            assert replica.record_autoscaling_stats() == {"queued_tokens": 0.0}
            await replica.check_health()
        finally:
            await replica._open.aclose()  # in Ray the process ends with it

    asyncio.run(use())
