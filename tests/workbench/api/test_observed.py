"""Who asked, in the request log: user, session, principal and trace of each request, as the caller named them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from workbench.host import fake_worker
from workbench.observe import request_reader
from workbench.services import Services
from workbench.settings import Settings

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_rows_hold_who_asked_and_how(serve: Any, tmp_path: Path) -> None:
    services = Services(Settings(home_dir=tmp_path, fake=True, demo=False, follow=""))
    with serve(partial(fake_worker, delay_s=0.0), services=services) as server:
        for body in (
            {"user": "ada", "metadata": {"session_id": "s-1"}},
            {"safety_identifier": "bob", "priority": 2},
            {},
        ):
            server.post(max_tokens=2, **body)
        headers = {"x-session-id": "s-2", "traceparent": TRACEPARENT, "x-request-id": "mine"}
        server.http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2, "n": 2}, headers=headers)
        server.post(max_tokens=2, user="refused", temperature=-1)
        server.post("/v1/completions", prompt="x" * 100_000, user="refused")
        assert services.request_log is not None
        assert services.request_log.origin_of("mine") == {}
        assert not services.request_log._origins  # what was refused leaves nothing behind
    rows = request_reader.read(tmp_path).to_pylist()
    told = {(r["user"], r["session"], r["operation"], r["traceparent"], r["priority"]) for r in rows}
    assert told == {
        ("ada", "s-1", "chat", None, 0),
        ("bob", None, "chat", None, 2),
        (None, None, "chat", None, 0),
        (None, "s-2", "text_completion", TRACEPARENT, 0),
    }
    assert {r["request_id"] for r in rows if r["session"] == "s-2"} == {"mine", "mine-1"}
