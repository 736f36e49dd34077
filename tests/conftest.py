"""What holds for every test: in which order they run, and what the garbage collector looks at."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

BROWSER = Path(__file__).parent / "browser"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Browser tests last: Playwright keeps an event loop running in the main thread, where others start their own."""
    items.sort(key=lambda item: BROWSER in item.path.parents)


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """Sets aside what is alive before a file's tests (imports, collected tests): each engine that closes collects garbage, and
    walking all of that took half of such a test's time. What a test makes itself is collected as ever."""
    gc.collect()
    gc.freeze()
