"""What holds for every test: in which order they run."""

from __future__ import annotations

from pathlib import Path

import pytest

BROWSER = Path(__file__).parent / "browser"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Browser tests last: Playwright keeps an event loop running in the main thread, where others start their own."""
    items.sort(key=lambda item: BROWSER in item.path.parents)
