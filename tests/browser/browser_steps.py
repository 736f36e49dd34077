"""What a person does and sees on the pages, as steps that several tests take."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

BUNDLED = Path(__file__).resolve().parents[2] / "data" / "models" / "chat-base" / "model.safetensors"
LOAD_MS = 240_000  # importing torch on a busy machine
BOX = "textarea[data-testid=stChatInputTextArea]"


def chip_says(page: Page, word: str, timeout_ms: float | None = None) -> None:
    expect(page.locator(".q-chip[role=status]")).to_contain_text(re.compile(word), timeout=timeout_ms)


def ask(page: Page, text: str) -> None:
    """Type into the chat box and send with Enter."""
    box = page.locator(BOX)
    expect(box).to_be_enabled()
    box.fill(text)
    box.press("Enter")


def finished_answers(page: Page) -> Locator:
    """The figures under each answer that has ended."""
    return page.locator(".q-figures", has_text="TTFT")


def summary_of(page: Page) -> str:
    """The timeline's sentence: how many steps the window has."""
    return page.locator(".timeline canvas").get_attribute("aria-label") or ""


def hold_still(page: Page, milliseconds: int = 4500) -> bool:
    """Whether the timeline stays as it is."""
    before = summary_of(page)
    page.wait_for_timeout(milliseconds)
    return summary_of(page) == before
