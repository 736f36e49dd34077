"""A real browser and real app processes on free ports."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from workbench import settings as settings_module
from workbench.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))  # browser_steps
ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--force-color-profile=srgb", "--hide-scrollbars",
)  # fmt: skip
PATIENCE_MS = 60_000  # two busy cores may be slow; nothing here measures time
expect.set_options(timeout=PATIENCE_MS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt install chromium, or set CHROMIUM)")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


class Visit:
    """A browser context on one app, with every request that left it."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context = context
        self.url = url
        self.requested: list[str] = []
        context.on("request", lambda request: self.requested.append(request.url))
        context.set_default_timeout(PATIENCE_MS)

    def open(self, path: str = "/") -> Page:
        page = self.context.new_page()
        page.goto(self.url + path)
        return page

    def outside(self) -> list[str]:
        """Requests to anything but the app."""
        own = (self.url, self.url.replace("http:", "ws:"), "data:", "blob:")
        return [url for url in self.requested if not url.startswith(own)]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens contexts; after the test, nothing may have gone out of the machine."""
    visits: list[Visit] = []

    def make(url: str, scheme: str = "light") -> Visit:
        context = browser.new_context(viewport={"width": 1360, "height": 1000}, color_scheme=scheme)
        visits.append(Visit(context, url))
        return visits[-1]

    yield make
    outside = [url for one in visits for url in one.outside()]
    for one in visits:
        one.context.close()
    assert outside == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], url: str, log: Path, **env: str) -> Iterator[str]:
    """An app process, from the moment it answers until it is told to end."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            wait_until_answers(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_answers(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            urllib.request.urlopen(url + "/healthz", timeout=2).read()
            return
        except urllib.error.HTTPError:  # it answers that a load failed
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"no answer within {timeout_s} s: {log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="session")
def start_app(tmp_path_factory: pytest.TempPathFactory):
    """Starts the product's own process with these variables."""

    @contextmanager
    def start(**env: str) -> Iterator[str]:
        home, port = tmp_path_factory.mktemp("home"), free_port()
        variables = {"PORT": str(port), "MLFLOW_PORT": str(free_port()), "HOME_DIR": str(home), **env}
        command = [sys.executable, "-m", "workbench.app"]
        with running(command, f"http://127.0.0.1:{port}", home / "app.log", **variables) as url:
            yield url

    return start


@pytest.fixture(scope="session")
def start_site(tmp_path_factory: pytest.TempPathFactory):
    """Starts `quire up`: the app, MLflow and the scheduler, with a fresh HOME_DIR and these variables; its settings."""

    @contextmanager
    def start(**env: str) -> Iterator[Settings]:
        home = tmp_path_factory.mktemp("site")
        made = settings_module.load(port=free_port(), mlflow_port=free_port(), home_dir=home / "home")
        variables = {
            "PORT": str(made.port),
            "MLFLOW_PORT": str(made.mlflow_port),
            "HOME_DIR": str(made.home_dir),
            **env,
        }
        command = [sys.executable, "-m", "workbench.cli", "up"]
        with running(command, made.url, home / "up.log", PYTHONPATH=str(ROOT), **variables):
            yield made

    return start


@pytest.fixture(scope="session")
def start_fake_app(tmp_path_factory: pytest.TempPathFactory):
    """Starts the app over a FakeRunner, on a free port unless one is given, with a model of the name `beside` if there is one; the
    second value is the file that breaks its device."""

    @contextmanager
    def start(delay_s: float = 0.02, port: int | None = None, beside: str = "") -> Iterator[tuple[str, Path]]:
        home, port = tmp_path_factory.mktemp("home"), port or free_port()
        break_file = home / "break"
        command = [
            sys.executable, str(Path(__file__).with_name("fake_app.py")), str(port), str(home), str(delay_s), str(break_file),
            beside,
        ]  # fmt: skip
        with running(command, f"http://127.0.0.1:{port}", home / "app.log", PYTHONPATH=str(ROOT)) as url:
            yield url, break_file

    return start


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures go: the folder in SCREENSHOTS_DIR, else a temporary one."""
    named = os.environ.get("SCREENSHOTS_DIR")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
