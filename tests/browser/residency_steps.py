"""What a person does with several versions: load, ask side by side, sleep, wake and unload them; each step ends with its outcome."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlencode

from browser_steps import ask, finished_answers
from checklist_steps import SWAP_MS, go_to
from playwright.sync_api import Locator, Page, expect


def resident(page: Page, model: str) -> Locator:
    """Its row in the list of what is loaded."""
    return page.locator("[class*=st-key-resident_]").filter(has=page.get_by_text(model, exact=True))


def load_version(page: Page, name: str, version: int) -> None:
    go_to(page, "Versions")
    card = page.locator(f"[class*=st-key-version_{name}-{version}]")
    card.get_by_role("button", name="Load", exact=True).click()
    expect(page.get_by_text(f"Load {name} v{version}: done")).to_be_visible(timeout=SWAP_MS)
    expect(resident(page, f"{name}/{version}")).to_contain_text("an adapter of")


def load_adapter(page: Page, folder: str, name: str) -> None:
    """A PEFT folder: over its base, which is loaded, and in the registry."""
    page.get_by_role("textbox", name="Folder, hub id or version").fill(folder)
    page.get_by_role("textbox", name="Name in the registry").fill(name)
    page.get_by_role("button", name="Load", exact=True).last.click()
    expect(resident(page, name)).to_contain_text("an adapter of chat-base", timeout=SWAP_MS)
    expect(page.get_by_role("radio", name=name)).to_be_visible(timeout=SWAP_MS)


def sleep_and_wake(page: Page, model: str) -> None:
    row = resident(page, model)
    row.get_by_role("button", name="Sleep").click()
    expect(row).to_contain_text("asleep", timeout=SWAP_MS)
    row.get_by_role("button", name="Wake").click()
    expect(row).to_contain_text("ready", timeout=SWAP_MS)


def unload(page: Page, model: str) -> None:
    resident(page, model).get_by_role("button", name="Unload").click()
    expect(resident(page, model)).to_have_count(0, timeout=SWAP_MS)


def ask_beside(page: Page, url: str, other: str, schema: dict[str, Any], question: str) -> list[Any]:
    """The default model and another one, both held to a schema; what each of them answered."""
    asked = {"output": "JSON schema", "output_json": json.dumps(schema), "output_compact": "true"}
    page.goto(f"{url}/playground?{urlencode(asked)}")
    page.get_by_test_id("stMultiSelect").click()
    page.get_by_role("option", name=re.compile(f"^{other}")).click()
    expect(page.get_by_placeholder("Ask all 2; Enter sends")).to_be_visible()
    ask(page, question)
    expect(finished_answers(page)).to_have_count(2, timeout=SWAP_MS)
    expect(page.get_by_text("✓ JSON parses")).to_have_count(2)
    columns = page.get_by_test_id("stColumn").filter(has=page.locator(".q-version"))
    texts = columns.locator(".q-answer").evaluate_all(
        "all => all.map(one => [...one.querySelectorAll('.q-tok:not(.q-end)')].map(t => t.textContent).join(''))"
    )
    return [json.loads(text) for text in texts]


def call_a_tool(page: Page, chip: str, result: str) -> None:
    """By a task that has tools: the model calls one, the person answers for it, the model goes on."""
    page.get_by_role("button", name=re.compile(f"^{chip}")).first.click()
    expect(page.locator(".q-call")).to_be_visible(timeout=SWAP_MS)
    page.get_by_role("textbox", name=re.compile("^Result of")).fill(result)
    page.get_by_role("button", name="Send results").click()
    expect(finished_answers(page)).to_have_count(2, timeout=SWAP_MS)


def plan(page: Page, folder: str) -> None:
    page.get_by_role("textbox", name="Folder, *.gguf file or hub id").fill(folder)
    page.get_by_role("button", name="Plan", exact=True).click()
    table = page.locator("table.q-table", has_text="KV per token")
    for weights in ("as stored", "int8", "int4", "fp8"):
        expect(table).to_contain_text(weights, timeout=SWAP_MS)
