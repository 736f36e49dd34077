"""Fixtures of the page tests."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from streamlit.components.v2 import manifest_scanner
from streamlit.testing.v1 import AppTest

sys.path.insert(0, str(Path(__file__).parent))  # page_world

from page_world import ROOT, FakeHost
from records_world import Records, copy_home, fill_registry, settings_of

from workbench.ui import resources


@pytest.fixture(scope="session", autouse=True)
def scanned_once() -> Iterator[None]:
    """Streamlit reads the metadata of every installed package when a test opens a page, to find components: most of the test's
    time. What is installed stays as it is while tests run."""
    with pytest.MonkeyPatch.context() as patch:
        scan = functools.cache(manifest_scanner.scan_component_manifests)
        patch.setattr(manifest_scanner, "scan_component_manifests", scan)
        yield


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


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HOME_DIR whose MLflow store has its schema and nothing in it; made once, since that takes seconds."""
    from workbench import tracking

    home = tmp_path_factory.mktemp("empty") / "home"
    tracking.client(settings_of(home)).search_experiments()
    return home


@pytest.fixture(scope="session")
def registry_home(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Path:
    """A HOME_DIR whose registry has three versions."""
    home = tmp_path_factory.mktemp("registry") / "home"
    fill_registry(copy_home(empty_home, home))
    return home


@pytest.fixture
def records(
    tmp_path: Path, empty_home: Path, registry_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Records]]:
    """Makes real records (store, jobs, a registry with three versions unless `empty`) under a host that is ready."""
    made: list[Records] = []

    def make(*, empty: bool = False, **runner_options: Any) -> Records:
        settings = copy_home(empty_home if empty else registry_home, tmp_path / "home")
        for (
            name,
            value,
        ) in settings.to_env().items():  # an app's process has them: kinds of jobs read them again
            monkeypatch.setenv(name, value)
        made.append(Records(settings, **runner_options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def open_page() -> Callable[[str], AppTest]:
    """Runs the site's script on one page."""

    def run(name: str) -> AppTest:
        at = AppTest.from_file(str(ROOT / "workbench" / "ui" / "main.py"), default_timeout=20).run()
        if name != "overview":
            at = at.switch_page(f"../../pages/{name}.py").run()
        return at

    return run
