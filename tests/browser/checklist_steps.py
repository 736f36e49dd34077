"""The first ten minutes as a person does them, step by step; each step ends when the page shows its outcome."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from browser_steps import finished_answers
from playwright.sync_api import Locator, Page, expect

RUN_MS = 240_000  # a benchmark or a comparison on two busy cores
SWAP_MS = 60_000


def ticks(page: Page) -> Locator:
    return page.locator(".q-checks li.done")


def go_to(page: Page, name: str) -> None:
    """By the navigation, as a person does."""
    page.get_by_role("link", name=name, exact=True).click()
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()


def ask_with_a_click(page: Page) -> None:
    go_to(page, "Playground")
    page.locator("[class*=st-key-chip_0] button").first.click()
    expect(finished_answers(page)).to_have_count(1)


def thumb_up(page: Page) -> None:
    """On the answer of the Playground; it is on the disk when the page says so."""
    page.locator("[class*=st-key-thumbs] button").first.click()
    expect(page.get_by_text("kept: thumbs")).to_be_visible()


def benchmark(page: Page) -> None:
    go_to(page, "Benchmark")
    page.get_by_role("button", name="Run the 30-second benchmark").click()
    expect(page.get_by_text("Percentiles")).to_be_visible(timeout=RUN_MS)
    expect(page.locator(".js-plotly-plot")).to_have_count(4)


def compare(page: Page) -> str:
    """Start the proposed comparison; the verdict's heading."""
    go_to(page, "Compare")
    page.get_by_role("button", name="Compare them").click(timeout=RUN_MS)
    verdict = page.locator(".q-verdict h3")
    expect(verdict).to_be_visible(timeout=2 * RUN_MS)
    return verdict.inner_text()


def promote_from_compare(page: Page) -> None:
    page.get_by_role("button", name=re.compile(r"^Promote v2$")).click()
    page.get_by_role("button", name="Promote v2 to @champion").click()
    expect(page.get_by_text(re.compile("Promote ticket-extractor v2 to @champion: done"))).to_be_visible()


def followed(page: Page, version: int) -> None:
    expect(page.get_by_text(f"serving v{version}, as the registry says")).to_be_visible(timeout=SWAP_MS)


def roll_back(page: Page) -> None:
    go_to(page, "Versions")
    page.get_by_role("button", name="Roll back", exact=True).click()
    page.get_by_role("button", name="Roll back to v1").click()
    expect(page.get_by_text("v2 → v1")).to_be_visible(timeout=SWAP_MS)


def own_model(bundled: Path, folder: Path) -> Path:
    """A model that is not the bundled one: the same weights under other end-of-text settings, so another digest."""
    shutil.copytree(bundled, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "of_ones_own": True}))
    return folder


def load_own(page: Page, folder: Path) -> None:
    go_to(page, "Versions")
    page.get_by_role("textbox", name="Folder, hub id or version").fill(str(folder))
    page.get_by_role("button", name="Load", exact=True).last.click()
    expect(page.get_by_text(re.compile(f"Load .*{folder.name}.*: done"))).to_be_visible(timeout=SWAP_MS)
