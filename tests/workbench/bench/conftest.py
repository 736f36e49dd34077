"""One app process for the whole file of tests that only load it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a running app."""
    from bench_world import serving, settings_of

    settings = settings_of(tmp_path_factory.mktemp("bench") / "home")
    with serving(settings):
        yield settings
