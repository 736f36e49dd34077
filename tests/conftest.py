"""What holds for every test: in which order they run, what the garbage collector looks at, that Ctrl+C can be sent, and how
tests that inject faults tell what came of them."""

from __future__ import annotations

import gc
import signal
from pathlib import Path

import pytest

from tests.faults_table import Teller, test_of

BROWSER = Path(__file__).parent / "browser"


def pytest_configure() -> None:
    """What a shell runs in its background ignores Ctrl+C, and so would the processes that tests send it to."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Browser tests last: Playwright keeps an event loop running in the main thread, where others start their own."""
    items.sort(key=lambda item: BROWSER in item.path.parents)


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """Sets aside what is alive before a file's tests (imports, collected tests): each engine that closes collects garbage, and
    walking all of that took half of such a test's time. What a test makes itself is collected as ever."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Teller:
    """``fault("name", fails=…, goes_on=…, afterwards=…)``: the row of docs/faults.md that this test has seen."""
    return Teller(test_of(request.path, request.function.__name__))
