"""Loading, failure and death of the engine, and the keyboard, in a real browser."""

from __future__ import annotations

import re

import pytest
from browser_steps import ask, chip_says, finished_answers
from playwright.sync_api import expect

PATHS = {"overview": "/", "playground": "/playground", "engine": "/engine"}


def test_failed_load_is_told_on_every_page(start_app, visit):
    with start_app(QUIRE_MODEL="/no/such/model") as url:
        here = visit(url)
        for path in PATHS.values():
            page = here.open(path)
            alert = page.get_by_role("alert")
            expect(alert).to_contain_text("The engine is not running")
            expect(alert).to_contain_text("model_not_found")
            chip_says(page, "engine failed")
            assert "Traceback" not in page.content()


@pytest.fixture(scope="module")
def fake(start_fake_app):
    with start_fake_app() as started:
        yield started


def test_keyboard_alone_asks_reads_and_stops(fake, visit):
    url, _ = fake
    page = visit(url).open("/playground?max_tokens=300")
    chip_says(page, "healthy")
    ask(page, "hello")
    expect(page.get_by_text(re.compile(r"[1-9]\d* tokens so far"))).to_be_visible()
    page.keyboard.press("Escape")  # the cursor is still in the box
    expect(finished_answers(page)).to_have_count(1)
    expect(page.locator(".q-figures").last).to_contain_text("stopped")
    doubts = page.get_by_text("least certain tokens")
    doubts.focus()
    page.keyboard.press("Enter")
    expect(page.locator("details table")).to_be_visible()


def test_settings_changed_while_it_answers_leave_the_answer_alone(fake, visit):
    url, _ = fake
    page = visit(url).open("/playground?max_tokens=150")
    chip_says(page, "healthy")
    ask(page, "hello")
    expect(page.get_by_text(re.compile(r"[1-9]\d* tokens so far"))).to_be_visible()
    page.get_by_role("textbox", name="Seed").fill("5")
    page.keyboard.press("Tab")
    expect(finished_answers(page)).to_have_count(1)
    expect(page.locator(".q-figures").last).to_contain_text("token limit")
    expect(page.locator(".q-figures").last).to_contain_text("150")
    assert "seed=5" in page.url


def test_answer_goes_on_while_another_page_is_looked_at(fake, visit):
    url, _ = fake
    page = visit(url).open("/playground?max_tokens=200")
    chip_says(page, "healthy")
    ask(page, "hello")
    expect(page.get_by_text(re.compile(r"[1-9]\d* tokens so far"))).to_be_visible()
    page.get_by_role("link", name="Engine").click()
    chip_says(page, "busy")
    expect(page.locator(".map canvas")).to_have_attribute("aria-label", re.compile("held by 1 sequence"))
    page.get_by_role("link", name="Playground").click()
    expect(finished_answers(page)).to_have_count(1)
    expect(page.locator(".q-figures").last).to_contain_text("200")


@pytest.mark.full
def test_reasoning_is_folded_above_the_answer(start_fake_app, visit):
    with start_fake_app(beside="thinker") as (url, _):
        page = visit(url).open("/playground")
        page.get_by_test_id("stMultiSelect").click()
        page.get_by_role("option", name=re.compile("^thinker")).click()
        ask(page, "hello")
        thought = page.locator(".q-reasoning")
        expect(thought.locator("summary")).to_contain_text(re.compile(r"Reasoning \d+ tokens"))
        columns = page.get_by_test_id("stColumn").filter(has=page.locator(".q-version"))
        expect(columns.last.locator(".q-answer").last).to_have_text("Four.end")
        expect(thought.locator(".q-answer")).to_be_hidden()
        thought.locator("summary").click()
        expect(thought.locator(".q-answer")).to_have_text("Two and two.")


def test_timeline_is_read_and_picked_with_the_keyboard(fake, visit):
    url, _ = fake
    here = visit(url)
    page = here.open("/playground?max_tokens=60")
    chip_says(page, "healthy")
    ask(page, "hello")
    expect(finished_answers(page)).to_have_count(1)
    engine = here.open("/engine")
    canvas = engine.locator(".timeline canvas")
    expect(canvas).to_have_attribute("aria-label", re.compile(r"Timeline of [1-9]"))
    canvas.focus()
    for _ in range(10):
        engine.keyboard.press("ArrowLeft")
    expect(engine.locator(".timeline .tip")).to_contain_text("decode:")
    engine.keyboard.press("Enter")
    expect(engine.get_by_text("Rows of this step")).to_be_visible()
    engine.get_by_text("Live", exact=True).click()
    expect(engine.get_by_text("Rows of this step")).to_be_hidden()


def test_death_of_the_engine_is_told_without_a_reload(start_fake_app, visit):
    with start_fake_app() as (url, break_file):
        here = visit(url)
        pages = {name: here.open(path) for name, path in PATHS.items()}
        for page in pages.values():
            chip_says(page, "healthy")
        break_file.touch()
        ask(pages["playground"], "hello")
        for page in pages.values():
            expect(page.get_by_role("alert").first).to_contain_text("the device is gone")
            chip_says(page, "engine failed")
