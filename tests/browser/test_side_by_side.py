"""Two versions side by side in a real browser: chosen, asked at once, one of them stopped, shared by a link, stacked when narrow."""

from __future__ import annotations

import re

import pytest
from browser_steps import ask, chip_says, finished_answers
from playwright.sync_api import expect
from residency_steps import resident, sleep_and_wake, unload

_STACKED = """new Set([...document.querySelectorAll("[data-testid=stColumn]:has(.q-answer)")]
  .map(column => column.getBoundingClientRect().y)).size > 1"""


@pytest.mark.full
def test_two_versions_answer_beside_each_other_and_one_is_stopped(start_fake_app, visit, screenshots):
    with start_fake_app(beside="other") as (url, _):
        here = visit(url)
        page = here.open("/playground?max_tokens=150")
        chip_says(page, "healthy")
        page.get_by_test_id("stMultiSelect").click()
        page.get_by_role("option", name=re.compile("^other")).click()
        expect(page.get_by_placeholder("Ask all 2; Enter sends")).to_be_visible()
        ask(page, "hello")
        expect(page.get_by_text(re.compile(r"[1-9]\d* tokens so far"))).to_have_count(2)
        columns = page.get_by_test_id("stColumn").filter(has=page.locator(".q-version"))
        columns.last.get_by_role("button", name="Stop").click()
        expect(columns.last.locator(".q-figures")).to_contain_text("stopped")
        expect(columns.first.locator(".q-figures")).to_contain_text("token limit")

        shared = here.open(page.url.removeprefix(url))
        expect(finished_answers(shared)).to_have_count(2)
        expect(shared.get_by_test_id("stMultiSelect")).to_contain_text("other")
        for width, stacked in ((1360, "false"), (480, "true")):
            shared.set_viewport_size({"width": width, "height": 1000})
            shared.wait_for_function(f"() => ({_STACKED}) === {stacked}")
            shared.screenshot(path=screenshots / f"side-by-side-{width}.png")

        versions = here.open("/versions")
        expect(resident(versions, "fake-echo")).to_contain_text("the default")
        sleep_and_wake(versions, "other")
        unload(versions, "other")
