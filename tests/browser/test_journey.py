"""A person's first minutes in a real browser, on the bundled model: see it load, ask, stop, look inside, copy as code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from browser_steps import BOX, BUNDLED, LOAD_MS, ask, chip_says, finished_answers, hold_still, summary_of
from playwright.sync_api import expect


@pytest.fixture(scope="module")
def app(start_app):
    env = {} if BUNDLED.is_file() else {"QUIRE_FAKE": "true"}  # the fake one until the model is trained
    with start_app(**env) as url:
        yield url


def test_first_minutes(app, visit, screenshots):
    here = visit(app)

    overview = here.open("/")
    chip_says(overview, "healthy", LOAD_MS)  # loads by itself; the page follows
    expect(overview.get_by_role("combobox", name="Version")).to_have_value(re.compile("demo, 7 M"))
    expect(overview.get_by_text(re.compile("Trained for"))).to_be_visible()
    overview.get_by_role("link", name="Ask the model something", exact=True).click()

    page = overview
    page.wait_for_url(re.compile("/playground"))
    expect(page.get_by_text("Try a task that it passes")).to_be_visible()
    page.locator("[class*=st-key-chip_0] button").first.click()
    expect(finished_answers(page)).to_have_count(1)
    figures = page.locator(".q-figures").last
    for word in ("TTFT", "TPOT", "tokens/s", "prompt", "output", "seed"):
        expect(figures).to_contain_text(word)

    token = page.locator(".q-tok").first
    token.hover()
    tip = token.evaluate("e => getComputedStyle(e, '::after').content")
    assert re.search(r"\d+\.\d\d %, rank \d+", tip), tip
    assert tip.count("%") >= 2  # the chosen one and its alternatives

    conversation = re.search(r"chat=([\w-]+)", page.url)
    assert conversation, page.url
    page.reload()
    expect(finished_answers(page)).to_have_count(1)

    # a long answer, watched on the Engine page
    long = f"{app}/playground?max_tokens=1900&ignore_eos=true&temperature=0.9"
    engine = here.open("/engine")
    chip_says(engine, "idle")
    page.bring_to_front()
    page.goto(long)
    ask(page, "Tell me a story about a fox and a lamp.")
    expect(page.locator("[aria-busy=true]")).to_be_visible()
    expect(page.get_by_text(re.compile(r"\d+ tokens so far"))).to_be_visible()
    engine.bring_to_front()
    chip_says(engine, "busy")
    expect(engine.locator(".map canvas")).to_have_attribute("aria-label", re.compile("held by 1 sequence"))
    before = summary_of(engine)
    expect(engine.locator(".timeline canvas")).not_to_have_attribute("aria-label", before)  # it is live
    engine.screenshot(path=screenshots / "engine-live-light.png")
    engine.get_by_text("Paused", exact=True).click()
    expect(engine.get_by_text("Rows of this step")).to_be_visible()
    expect(engine.get_by_text(re.compile("before the pause")).last).to_be_visible()
    step = engine.locator(".q-tiles dd").first
    shown = step.inner_text()
    engine.get_by_text("Step back").click()
    expect(step).not_to_have_text(shown)
    assert hold_still(engine)

    # another one (the first may have ended meanwhile), stopped with Escape while the cursor is in the box
    page.bring_to_front()
    page.goto(long)
    ask(page, "Tell me a story about a bird and a well.")
    expect(page.get_by_text(re.compile(r"\d+ tokens so far"))).to_be_visible()
    page.locator(BOX).focus()
    page.keyboard.press("Escape")
    expect(page.locator(".q-figures").last).to_contain_text("stopped")
    chip_says(page, "idle")

    page.get_by_role("button", name="Copy as code").first.click()
    code = page.locator("[data-testid=stPopoverBody] code").first
    expect(code).to_contain_text("curl http")
    curl = code.inner_text().replace('"max_tokens": 1900', '"max_tokens": 4')
    page.get_by_role("tab", name="Python").click()
    python = page.locator("[data-testid=stPopoverBody] code").last
    expect(python).to_contain_text("OpenAI")
    script = python.inner_text().replace("max_tokens=1900", "max_tokens=4")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    if shutil.which("curl"):
        done = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(done.stdout)["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_both_themes(scheme, app, visit, screenshots):
    here = visit(app, scheme)
    playground = here.open("/playground?max_tokens=40&logprobs=4")
    chip_says(playground, "healthy")
    ask(playground, "Count the items: fork, lamp, onion.")
    expect(finished_answers(playground)).to_have_count(1)
    playground.locator(".q-tok").nth(1).hover()
    playground.screenshot(path=screenshots / f"playground-{scheme}.png")
    for name, proof in (("overview", "Needs attention"), ("engine", "KV blocks")):
        page = here.open("/" if name == "overview" else f"/{name}")
        expect(page.get_by_text(proof).first).to_be_visible()
        page.wait_for_timeout(1500)
        page.screenshot(path=screenshots / f"{name}-{scheme}.png")
        ground = page.evaluate(
            "getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor"
        )
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]
