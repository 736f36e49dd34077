"""Each page with no engine yet, with none at all, idle, at work, and after its engine died."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from page_world import FakeHost, html_of, make_worker

from engine.config import EngineConfig
from engine.errors import EngineDeadError, ModelNotFoundError
from engine.sampling_params import SamplingParams
from workbench.host import FAKE_MODEL, EngineHost, HostPhase
from workbench.ui import resources

PAGES = ("overview", "playground", "engine")


@pytest.fixture
def provided():
    """Provides a host for a test and takes it away."""
    hosts: list[EngineHost] = []

    def provide(host: EngineHost) -> EngineHost:
        resources.provide(host)
        hosts.append(host)
        return host

    yield provide
    resources.provide(None)
    for host in hosts:
        host.close()


@pytest.mark.parametrize("page", PAGES)
def test_loading_shows_progress_and_goes_on_when_ready(page, provided, open_page):
    go_on, reported = threading.Event(), threading.Event()

    def slow_factory(config: EngineConfig, *, progress: Any, on_fatal: Any) -> Any:
        progress("Reading weights", 0.4)
        reported.set()
        assert go_on.wait(20)
        return make_worker(on_fatal=on_fatal)[0]

    host = provided(EngineHost(EngineConfig(model=FAKE_MODEL), factory=slow_factory))
    host.start()
    assert reported.wait(10)
    at = open_page(page)
    assert not at.exception
    assert "Loading" in html_of(at)
    assert "loading 40%" in html_of(at)
    assert not at.chat_input
    go_on.set()
    assert host.wait(10).ready
    at.run()
    assert not at.exception
    assert "Loading" not in html_of(at)
    assert "healthy, idle" in html_of(at)


@pytest.mark.parametrize("page", PAGES)
def test_failed_load_says_what_happened_and_what_to_do(page, provided, open_page):
    def failing_factory(config: EngineConfig, *, progress: Any, on_fatal: Any) -> Any:
        raise ModelNotFoundError("no model at 'x<y'", value="x<y", limit="a folder", remedy="Name a folder.")

    host = provided(EngineHost(EngineConfig(model=FAKE_MODEL), factory=failing_factory))
    host.start()
    assert host.wait(10).phase is HostPhase.FAILED
    at = open_page(page)
    assert not at.exception
    shown = html_of(at)
    for part in ("The engine is not running", "x&lt;y", "a folder", "Name a folder.", "model_not_found"):
        assert part in shown
    assert "Traceback" not in shown
    assert "x<y" not in shown
    assert not at.chat_input


@pytest.mark.parametrize("page", PAGES)
def test_engine_that_died_is_told(page, ready_host, open_page):
    fake: FakeHost = ready_host()
    at = open_page(page)
    fake.runner.fail_next(EngineDeadError("the device is gone"))
    completion = fake.worker.submit([1, 2, 3], SamplingParams(max_tokens=4)).result(10)
    assert completion.error
    deadline = time.monotonic() + 10
    while fake.host.state().ready and time.monotonic() < deadline:
        time.sleep(0.01)
    at.run()
    assert not at.exception
    assert "the device is gone" in html_of(at)
    assert "engine failed" in html_of(at)
    assert not at.chat_input


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("overview", "No request has ended yet"),
        ("playground", "held out from its training"),
        ("engine", "No step yet"),
    ],
)
def test_empty_page_says_how_to_fill_it(page, sentence, ready_host, open_page):
    ready_host()
    at = open_page(page)
    assert not at.exception
    assert sentence in html_of(at)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_shows_the_engine_at_work(page, ready_host, open_page):
    fake: FakeHost = ready_host(delay_s=0.02)
    stream = fake.worker.submit(list(range(40)), SamplingParams(max_tokens=400, ignore_eos=True))
    reader = iter(stream)
    next(reader)  # dropping the reader would abort the request
    time.sleep(0.1)  # statistics are at most 50 ms behind
    at = open_page(page)
    assert not at.exception
    assert "busy, 1 of 8 slots" in html_of(at)
    stream.abort()
    stream.result(10)


def test_overview_lists_requests_with_figures_and_what_needs_attention(ready_host, open_page):
    fake: FakeHost = ready_host()
    fake.worker.submit(
        list(range(40)), SamplingParams(max_tokens=7, ignore_eos=True), request_id="first"
    ).result(10)
    fake.runner.fail_next(RuntimeError("a step broke"))
    fake.worker.submit([1, 2, 3], SamplingParams(max_tokens=7), request_id="second").result(10)
    fake.worker.submit([1], SamplingParams(max_tokens=1, ignore_eos=True)).result(10)  # statistics catch up
    at = open_page("overview")
    shown = html_of(at)
    assert "first" in shown
    assert ">40<" in shown
    assert ">7<" in shown
    assert "1 steps failed" in shown
    assert "1 requests ended with an error" in shown
    assert "Nothing: no errors" not in shown


def test_engine_page_pauses_scrubs_and_steps(ready_host, open_page):
    fake: FakeHost = ready_host(delay_s=0.005)
    fake.worker.submit(list(range(40)), SamplingParams(max_tokens=60, ignore_eos=True)).result(20)
    at = open_page("engine")
    at.session_state["mode"] = "Paused"
    at.run()
    assert not at.exception
    assert "Rows of this step" in html_of(at)
    assert "before the pause" in html_of(at)
    last = fake.worker.records.last_step()
    assert f">{last.step_id}<" in html_of(at)
    at.button("step_Left").click().run()
    assert f">{last.step_id - 1}<" in html_of(at)
    at.button("step_Right").click().run()
    assert f">{last.step_id}<" in html_of(at)
    first = fake.worker.records.steps()[0]
    seconds = (first.ended_ns - at.session_state["engine_paused"]) / 1e9
    at.slider("back").set_value(round(seconds + 0.05, 1)).run()
    assert not at.exception
    assert "prefill" in html_of(at) or "decode" in html_of(at)
    assert f">{last.step_id}<" not in html_of(at)
    assert [element.type for element in at.main].count("plotly_chart") == 1


def test_an_engine_that_sleeps_is_woken_where_its_page_would_be(provided, open_page):
    host = provided(FakeHost().host)
    host.start()
    assert host.wait(10).ready
    at = open_page("engine")
    at.button("sleep_engine").click().run()
    while resources.actions().running():
        time.sleep(0.02)
    at.run()
    assert not at.exception
    assert "sleeps" in html_of(at)
    assert "asleep" in html_of(at)
    for page in ("overview", "playground"):
        assert "sleeps" in html_of(open_page(page)), page
    at.button("sleep_waiting").click().run()
    assert host.state().ready
    assert "healthy, idle" in html_of(at.run())
