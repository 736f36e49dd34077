"""Live parts: what the route answers is what the page shows, escaped, by digest where nothing changed, and only to known questions."""

from __future__ import annotations

import re
import time

import pytest
from page_world import FakeHost, html_of
from starlette.applications import Starlette
from starlette.testclient import TestClient

from engine.errors import EngineDeadError
from engine.sampling_params import SamplingParams
from workbench.jobs import JobState
from workbench.ui.components import feedback_table, job_bar, step_timeline
from workbench.ui.live_route import LiveRoute

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def client():
    with TestClient(Starlette(routes=LiveRoute().routes())) as opened:
        yield opened


def ask(client: TestClient, view: str, **parameters: str) -> dict:
    answer = client.get(f"/live/{view}", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def digests(answer: dict) -> list[str]:
    return [part["digest"] for kind in ("html", "data") for part in answer[kind].values()]


def run_one(fake: FakeHost, **options: str) -> None:
    fake.worker.submit([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True), **options).result(10)
    time.sleep(0.1)  # statistics are at most 50 ms behind


@pytest.mark.parametrize("page", ["overview", "engine"])
def test_page_and_route_show_the_same(page, client, ready_host, open_page):
    ready_host()
    answer = ask(client, page)
    shown = html_of(open_page(page))
    for name, part in answer["html"].items():
        assert f'data-live="{name}"' in shown
        assert part["value"] in shown
    assert len(answer["html"]) >= 6


def test_answer_follows_the_engine(client, ready_host):
    fake: FakeHost = ready_host()
    before = ask(client, "engine")
    assert "No step yet" in before["html"]["engine-note"]["value"]
    assert before["data"]["timeline"]["value"]["summary"] == "Timeline of 0 steps over 30 s."
    run_one(fake)
    after = ask(client, "engine", window="120", theme="dark")
    assert after["html"]["engine-note"]["value"] == ""
    steps = fake.worker.stats().steps
    assert after["data"]["timeline"]["value"]["summary"] == f"Timeline of {steps} steps over 120 s."
    assert after["data"]["block_map"]["value"]["theme"] == "dark"
    assert f"<dd>{steps:,}<small>" in after["html"]["engine-tiles"]["value"]
    assert after["state"] == before["state"]  # the page need not run again for that


def test_what_the_browser_has_comes_as_a_digest(client, ready_host):
    fake: FakeHost = ready_host()
    first = ask(client, "engine")
    again = ask(client, "engine", have=".".join(digests(first)))
    assert digests(again) == digests(first)
    assert not any("value" in part for kind in ("html", "data") for part in again[kind].values())
    run_one(fake)
    changed = ask(client, "engine", have=".".join(digests(first)))
    fresh = {name for kind in ("html", "data") for name, part in changed[kind].items() if "value" in part}
    assert fresh >= {"engine-note", "engine-tiles", "engine-blocks", "timeline"}
    assert not fresh & {"chip", "jobs", "engine-memory"}


def test_foreign_text_is_escaped(client, ready_host):
    fake: FakeHost = ready_host()
    run_one(fake, request_id=HOSTILE)
    for view in ("chip", "overview", "engine"):
        answer = client.get(f"/live/{view}", params={"model": HOSTILE})
        assert answer.status_code == 200
        assert all("<img" not in part["value"] for part in answer.json()["html"].values())
    assert "&lt;img src=x" in ask(client, "overview")["html"]["overview-requests"]["value"]


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("/live", 404, "name"),
        ("/live/", 404, "name"),
        ("/live/nothing", 404, "name"),
        ("/live/engine/../chip", 200, None),  # the client itself makes it /live/chip
        ("/live/engine/%2e%2e/%2e%2e/etc/passwd", 404, "name"),
        ("/live/engine?window=31", 400, "window"),
        ("/live/engine?window=", 400, "window"),
        ("/live/engine?theme=blue", 400, "theme"),
        ("/live/engine?have=zz", 400, "have"),
        ("/live/engine?have=" + ".".join(["0" * 16] * 33), 400, "have"),
        ("/live/engine?model=" + "m" * 513, 400, "model"),
        ("/live/engine?other=1", 400, None),
        ("/live/engine?theme=dark&theme=light", 400, None),
    ],
)
def test_unknown_questions_are_refused_by_type(path, status, param, client, ready_host):
    ready_host()
    answer = client.get(path)
    assert answer.status_code == status
    if status != 200:
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param


def test_only_reading_is_allowed(client, ready_host):
    ready_host()
    assert client.post("/live/engine").status_code == 405


def test_page_is_told_to_run_again_when_the_engine_dies(client, ready_host):
    fake: FakeHost = ready_host()
    states = {view: ask(client, view)["state"] for view in ("chip", "overview", "engine")}
    fake.runner.fail_next(EngineDeadError("the device is gone"))
    fake.worker.submit([1, 2, 3], SamplingParams(max_tokens=4)).result(10)
    deadline = time.monotonic() + 10
    while fake.host.state().ready and time.monotonic() < deadline:
        time.sleep(0.01)
    for view, state in states.items():
        answer = ask(client, view)
        assert answer["state"] != state
        assert set(answer["html"]) == {"chip", "jobs"}


def test_page_is_told_to_run_again_when_other_jobs_run(client, records, monkeypatch):
    monkeypatch.setattr("workbench.ui.live_route.JOBS_AGE_S", 0.0)
    world = records()
    before = ask(client, "chip")
    world.job("finetune", {}, JobState.RUNNING, title=HOSTILE, fraction=0.25)
    after = ask(client, "chip")
    assert after["state"] != before["state"]
    assert re.search(r"&lt;img.*25%", after["html"]["jobs"]["value"])


def test_all_open_pages_share_one_reading(client, records):
    world = records()
    assert job_bar.active() == []
    job = world.job("finetune", {}, JobState.RUNNING)
    assert job_bar.active(max_age_s=60) == []  # as read above
    assert [found.id for found in job_bar.active()] == [job.id]  # a run of a page reads anew
    assert [found.id for found in job_bar.active(max_age_s=60)] == [job.id]
    assert "Nobody has said" in feedback_table.as_html(60)


def test_failure_is_logged_and_told_without_its_text(client, ready_host, monkeypatch, caplog):
    ready_host()

    def fail(*args: object) -> None:
        raise ValueError("<secret>")

    monkeypatch.setattr(step_timeline, "payload", fail)
    answer = client.get("/live/engine")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "<secret>" in caplog.text
