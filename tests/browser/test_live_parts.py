"""Live parts in a real browser: fresh without a run of the page, quiet for those who listen, and honest when no answer comes."""

from __future__ import annotations

import itertools
import re
import time

import httpx
import pytest
from browser_steps import ask, chip_says, summary_of
from playwright.sync_api import Page, expect

LIVE = ("overview", "engine", "playground")
LISTEN_MS = 3500  # several of the Engine page's intervals


@pytest.fixture(scope="module")
def fake(start_fake_app):
    with start_fake_app() as started:
        yield started[0]


def watched(here, path: str) -> tuple[Page, list[str]]:
    """A page, and what goes over its web socket: a run of the page is at least one message each way."""
    page, messages = here.context.new_page(), []

    def listen(socket) -> None:
        socket.on("framesent", lambda _: messages.append("sent"))
        socket.on("framereceived", lambda _: messages.append("received"))

    page.on("websocket", listen)
    page.goto(here.url + path)
    return page, messages


def stream(url: str, num_tokens: int) -> httpx.Response:
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "a", "max_tokens": num_tokens, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def tiles(page: Page) -> list[str]:
    return page.locator(".q-tiles dd").all_inner_texts()


@pytest.mark.parametrize(
    "name", [name if name == "engine" else pytest.param(name, marks=pytest.mark.full) for name in LIVE]
)
def test_live_parts_change_without_a_run_of_the_page(name, fake, visit):
    here = visit(fake)
    page, messages = watched(here, "/" if name == "overview" else f"/{name}")
    chip_says(page, "idle")
    page.wait_for_timeout(3000)  # the first run's last messages
    chip = page.locator(".q-chip[role=status]")
    chip.evaluate("element => { element.isTheSame = true; }")
    before = messages.copy(), tiles(page)
    assert before[0]
    playground = here.open("/playground?max_tokens=1500")  # 30 s at this speed
    chip_says(playground, "idle")
    ask(playground, "hello")
    chip_says(page, "busy")
    if name != "playground":
        expect(page.locator(".q-tiles").first).to_contain_text("1 of 8")
        assert tiles(page) != before[1]
    if name == "engine":
        expect(page.locator(".map canvas")).to_have_attribute("aria-label", re.compile("held by 1 sequence"))
        seen = summary_of(page)
        expect(page.locator(".timeline canvas")).not_to_have_attribute("aria-label", seen)
    playground.keyboard.press("Escape")
    chip_says(page, "idle")
    assert chip.evaluate("element => element.isTheSame")  # what is announced is its text, when it changes
    assert page.locator("[data-live=jobs]").get_attribute("aria-live") == "off"
    assert messages == before[0]


@pytest.mark.full
def test_click_on_the_live_timeline_pauses_at_that_time(fake, visit):
    stream(fake, 300)  # 6 s at this speed
    engine = visit(fake).open("/engine")
    canvas = engine.locator(".timeline canvas")
    expect(canvas).to_have_attribute("aria-label", re.compile(r"Timeline of [1-9]"))
    engine.wait_for_timeout(4000)  # the window has moved on since the page's run
    canvas.focus()
    for _ in range(200):
        engine.keyboard.press("ArrowLeft")
        tip = engine.locator(".timeline .tip").inner_text()
        if found := re.search(r"step (\d+)", tip):
            break
    assert found, tip
    engine.keyboard.press("Enter")
    expect(engine.get_by_text("Rows of this step")).to_be_visible()
    shown = int(engine.locator(".q-tiles dd").first.inner_text().split()[0].replace(",", ""))
    assert (
        abs(shown - int(found[1])) < 75
    )  # the window may move on by a second and more between reading and pressing


@pytest.mark.full
def test_hidden_page_asks_nothing(fake, visit):
    here = visit(fake)
    page = here.open("/engine")
    chip_says(page, "idle")

    def asked(milliseconds: int) -> int:
        del here.requested[:]
        page.wait_for_timeout(milliseconds)
        return sum("/live/engine" in url for url in here.requested)

    assert asked(LISTEN_MS) >= 2
    page.evaluate("""() => {
      Object.defineProperty(document, "visibilityState", { get: () => window.isHidden ? "hidden" : "visible" });
      window.isHidden = true;
      document.dispatchEvent(new Event("visibilitychange"));
    }""")
    asked(500)  # one may be under way
    assert asked(LISTEN_MS) == 0
    page.evaluate("() => { window.isHidden = false; document.dispatchEvent(new Event('visibilitychange')); }")
    assert asked(LISTEN_MS) >= 2
    expect(page.locator(".old")).to_be_hidden()


@pytest.mark.full
def test_missing_answers_are_told_and_asked_for_less_often_until_they_come(fake, visit):
    here = visit(fake)
    page = here.open("/engine")
    chip_says(page, "idle")
    failed: list[float] = []
    here.context.route(
        "**/live/**", lambda route: (failed.append(time.monotonic()), route.fulfill(status=500))[1]
    )
    note = page.locator(".old")
    expect(note).to_contain_text(re.compile(r"No answer from the server: last read \d+ s ago"))
    expect(note.locator("[role=status]")).to_have_text(
        "No answer from the server:"
    )  # the age is not announced
    for part in ("[data-live=engine-tiles]", ".st-key-timeline", ".st-key-block_map"):
        assert page.locator(part).evaluate("element => getComputedStyle(element).opacity") == "0.55"
    page.wait_for_timeout(4000)
    waits = [b - a for a, b in itertools.pairwise(failed)]
    assert waits[-1] > waits[0]
    here.context.unroute("**/live/**")
    expect(note).to_be_hidden()
    assert not page.locator("html").evaluate("element => element.classList.contains('q-old')")
    chip_says(page, "idle")


@pytest.mark.full
def test_server_that_stops_is_told_and_its_successor_is_followed(start_fake_app, visit):
    """The process ends and another one takes its port."""
    with start_fake_app() as (url, _):
        page = visit(url).open("/engine")
        chip_says(page, "idle")
        page.wait_for_timeout(1500)
    expect(page.locator(".old").first).to_contain_text("last read")
    with start_fake_app(port=int(url.rpartition(":")[2])) as (again, _):
        assert again == url
        expect(page.locator(".old").first).to_be_hidden()
        chip_says(page, "idle")
        stream(url, 100)
        expect(page.locator(".timeline canvas")).to_have_attribute(
            "aria-label", re.compile(r"Timeline of [1-9]")
        )
