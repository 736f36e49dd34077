"""What the app process keeps: acknowledged requests and votes outlive it, whatever ends it; the demo is registered once."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from workbench.device_lock import DeviceBusyError, DeviceLock
from workbench.jobs import JobState
from workbench.observe.feedback import list_feedback
from workbench.observe.request_log import RequestLog
from workbench.services import SEED_KIND, Services
from workbench.settings import Settings
from workbench.store import open_store

QUIET = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9/none", "QUIRE_FOLLOW": ""}
CHAT = {"messages": [{"role": "user", "content": "write to ann@example.org"}], "max_tokens": 5}


def logged(home: Path) -> dict[str, dict[str, Any]]:
    return {row["request_id"]: row for row in RequestLog.read(home).to_dict("records")}


def test_every_answered_request_is_on_the_log_with_what_the_setting_allows_of_its_text(served: Any) -> None:
    whole = httpx.post(f"{served.url}/v1/chat/completions", json=CHAT, timeout=30)
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
        assert list(stream.iter_lines())[-2] == "data: [DONE]"
    many = httpx.post(
        f"{served.url}/v1/completions", json={"prompt": ["a", "b"], "n": 2, "max_tokens": 3}, timeout=30
    )
    rows = logged(served.home)
    for answer in (whole, stream):
        row = rows[answer.headers["x-request-id"]]
        assert (row["model"], row["finish_reason"], row["num_output_tokens"]) == ("fake-echo", "length", 5)
        assert "ann@example.org" not in row["prompt"], "the default is redacted"
        assert "write to" in row["prompt"]
        assert row["output"] == "This "
    first = many.headers["x-request-id"]
    assert {first, *(f"{first}-{i}" for i in (1, 2, 3))} <= set(rows)


def test_feedback_is_on_the_disk_when_it_is_acknowledged(served: Any) -> None:
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=CHAT, timeout=30)
    votes = [
        {"kind": "thumbs", "value": "down", "comment": "wrong order"},
        {"kind": "correction", "correction": "the right one", "user": "ann"},
        {"kind": "score", "value": 4},
    ]
    for vote in votes:
        told = httpx.post(
            f"{served.url}/v1/feedback", json={"request_id": answer.json()["id"], **vote}, timeout=30
        )
        assert told.status_code == 200, told.text
    with open_store(served.home) as store:
        kept = list_feedback(store, request_ids=[answer.headers["x-request-id"]])
    assert {(each.kind, each.value, each.comment, each.correction) for each in kept} == {
        ("thumbs", "down", "wrong order", None), ("correction", None, None, "the right one"), ("score", 4.0, None, None),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"kind": "thumbs", "value": "up"}, "request_id"),
        ({"request_id": "x", "kind": "stars", "value": 1}, "kind"),
        ({"request_id": "x", "kind": "score", "value": 11}, "value"),
        ({"request_id": "x", "kind": "thumbs", "value": "up", "colour": "red"}, "colour"),
        ({"request_id": "", "kind": "thumbs", "value": "up"}, "request_id"),
    ],
)
def test_wrong_feedback_is_refused_by_name(served: Any, body: dict[str, Any], param: str) -> None:
    told = httpx.post(f"{served.url}/v1/feedback", json=body, timeout=30)
    assert (told.status_code, told.json()["error"]["param"]) == (400, param)


def test_the_app_owns_the_device_and_publishes_its_token_to_its_owner_alone(served: Any) -> None:
    app = served.app()
    with pytest.raises(DeviceBusyError) as caught:
        DeviceLock(served.home / "run").acquire()
    assert (caught.value.pid, caught.value.address) == (app["pid"], served.url)
    assert (served.home / "run" / "app.json").stat().st_mode & 0o777 == 0o600
    headers = {"authorization": f"Bearer {app['token']}"}
    assert (
        httpx.get(f"{served.url}/quire/residents", headers=headers).json()["residents"][0]["id"]
        == "fake-echo"
    )
    assert httpx.get(f"{served.url}/quire/residents").status_code == 401


def test_an_app_is_not_started_while_another_process_owns_the_device(
    quire: Callable[..., Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "home" / "run"
    run_dir.mkdir(parents=True)
    with DeviceLock(run_dir).acquire():
        refused = quire("serve", **QUIET)
        assert refused.process.wait(60) == 2
        refused.close()
    text = "\n".join(refused.lines)
    assert "device 0" in text
    assert "process" in text
    assert "Traceback" not in text


def test_no_acknowledged_request_or_vote_is_lost_when_the_app_is_killed(quire: Callable[..., Any]) -> None:
    generator = random.Random(5)
    acknowledged: list[str] = []
    votes: list[str] = []
    for _ in range(2):
        running = quire("serve", **QUIET)
        running.wait_line("is ready")
        stop = threading.Event()

        def client(url: str = running.url, stop: threading.Event = stop) -> None:
            with httpx.Client(base_url=url, timeout=10) as http:
                while not stop.is_set():
                    try:
                        answer = http.post("/v1/chat/completions", json=CHAT)
                        acknowledged.append(answer.headers["x-request-id"])
                        vote = {"request_id": acknowledged[-1], "kind": "thumbs", "value": "up"}
                        if http.post("/v1/feedback", json=vote).status_code == 200:
                            votes.append(vote["request_id"])
                    except httpx.HTTPError:
                        return

        threads = [threading.Thread(target=client) for _ in range(6)]
        for thread in threads:
            thread.start()
        enough, deadline = len(acknowledged) + 20, time.monotonic() + 30
        while len(acknowledged) < enough and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.3))
        running.process.send_signal(signal.SIGKILL)
        stop.set()
        for thread in threads:
            thread.join(20)
        running.close()
    home = running.home
    assert len(acknowledged) >= 40
    rows = logged(home)
    assert not [request_id for request_id in acknowledged if request_id not in rows]
    with open_store(home) as store:
        kept = {each.request_id for each in list_feedback(store, limit=100_000)}
    assert not set(votes) - kept


def test_the_demo_is_registered_once_and_only_where_it_is_wanted(tmp_path: Path) -> None:
    champion: list[int | None] = [None]

    def seeded(**settings: Any) -> list[Any]:
        services = Services(Settings(home_dir=tmp_path, **settings))
        services.open()
        try:
            services._seed(lambda name, alias: champion[0])
            assert services.jobs is not None
            return services.jobs.list(kind=SEED_KIND)
        finally:
            services.close()

    assert seeded(demo=False) == []
    assert seeded(fake=True) == []
    assert seeded(model="/my/model") == []
    [job] = seeded()
    assert (job.state, job.device) == (JobState.QUEUED, "none")
    assert len(seeded()) == 1, "one is waiting already"
    with open_store(tmp_path) as store, store.begin() as connection:
        from workbench.store import jobs as table

        connection.execute(table.update().values(state=JobState.DONE.value))
    champion[0] = 1
    assert len(seeded()) == 1, "done, and the registry has it"
    champion[0] = None
    assert len(seeded()) == 2, "done once, but this registry does not have it"
