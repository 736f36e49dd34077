"""A model that is swapped while a request is being read: the request is served by the successor, not refused."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response

from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.sampling_params import SamplingParams
from workbench.api.endpoints import on_current_worker
from workbench.host import EngineHost, fake_worker
from workbench.settings import FAKE_MODEL


def test_a_request_that_met_a_closed_engine_goes_to_its_successor(tmp_path: Path) -> None:
    host = EngineHost(EngineConfig(model=FAKE_MODEL), factory=partial(fake_worker, delay_s=0.0))
    with host:
        assert host.wait(20).ready
        seen: list[Any] = []

        async def start(worker: Any) -> Response:
            seen.append(worker)
            if len(seen) == 1:  # all of this happens between the look-up and the submission
                await asyncio.to_thread(host.load, str(tmp_path), as_default=True)
                await asyncio.to_thread(worker.close)
            worker.submit("hi", SamplingParams(max_tokens=2)).abort()
            return Response("served")

        assert asyncio.run(on_current_worker(host, None, start)).body == b"served"
        assert seen == [seen[0], host.worker()]
        assert seen[0] is not seen[1]


def test_a_dead_engine_without_a_successor_is_told_as_dead() -> None:
    host = EngineHost(EngineConfig(model=FAKE_MODEL), factory=partial(fake_worker, delay_s=0.0))
    with host:
        assert host.wait(20).ready

        async def start(worker: Any) -> Response:
            await asyncio.to_thread(worker.close)
            worker.submit("hi", SamplingParams(max_tokens=2))
            raise AssertionError("a closed worker takes nothing")

        with pytest.raises(EngineDeadError):
            asyncio.run(on_current_worker(host, None, start))


def test_without_records_feedback_is_refused_and_says_so(server: Any) -> None:
    told = server.http.post("/v1/feedback", json={"request_id": "x", "kind": "thumbs", "value": "up"})
    assert (told.status_code, told.json()["error"]["code"]) == (503, "store_not_ready")
