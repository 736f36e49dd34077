"""Fixtures of the page tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

sys.path.insert(0, str(Path(__file__).parent))  # page_world

from page_world import ROOT, FakeHost

from workbench.ui import resources


@pytest.fixture
def ready_host() -> Iterator[Callable[..., FakeHost]]:
    """Makes a host that is ready and provided to the pages; closed after the test."""
    made: list[FakeHost] = []

    def make(**runner_options: Any) -> FakeHost:
        fake = FakeHost(**runner_options)
        fake.host.start()
        assert fake.host.wait(10).ready, fake.host.state()
        resources.provide(fake.host)
        made.append(fake)
        return fake

    yield make
    resources.provide(None)
    for fake in made:
        fake.host.close()


@pytest.fixture
def open_page() -> Callable[[str], AppTest]:
    """Runs the site's script on one page."""

    def run(name: str) -> AppTest:
        at = AppTest.from_file(str(ROOT / "workbench" / "ui" / "main.py"), default_timeout=20).run()
        if name != "overview":
            at = at.switch_page(f"../../pages/{name}.py").run()
        return at

    return run
