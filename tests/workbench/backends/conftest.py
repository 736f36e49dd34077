"""An app as users start it (`quire serve` in a process of its own, over the tiny model), and HOME_DIRs without one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from workbench.ports import free_port
from workbench.run_state import RunState

ROOT = Path(__file__).resolve().parents[3]


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a child process with this HOME_DIR and nothing else of ours."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("QUIRE_", "MLFLOW_"))}
    return {
        **clean, "HOME_DIR": str(home), "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9/none",
        "QUIRE_FOLLOW": "", "QUIRE_DEMO": "false", **more,
    }  # fmt: skip


@dataclass
class RunningServe:
    home: Path
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="session")
def start_app() -> Iterator[Callable[..., RunningServe]]:
    """Starts `quire serve` on a free port; all are ended with the session."""
    started: list[RunningServe] = []

    def start(home: Path, **more: str) -> RunningServe:
        home.mkdir(parents=True, exist_ok=True)
        log = (home / "serve.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "workbench.cli", "serve", "--port", str(free_port())],
            env=environment(home, **more), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        log.close()
        running = RunningServe(home, process)
        started.append(running)
        deadline = time.monotonic() + 60
        while RunState(home / "run").read() is None:
            assert process.poll() is None, (home / "serve.log").read_text()
            assert time.monotonic() < deadline, "the app did not listen"
            time.sleep(0.05)
        return running

    yield start
    for running in started:
        running.process.terminate()
        running.process.wait(20)


def model_environment(folder: Path) -> dict[str, str]:
    return {
        "QUIRE_MODEL": str(folder),
        "QUIRE_NUM_BLOCKS": "256",
        "QUIRE_THREADS": "1",
        "QUIRE_DTYPE": "float32",
    }


@pytest.fixture(scope="session")
def app(
    start_app: Callable[..., RunningServe], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunningServe:
    """A running app with the tiny model, shared."""
    return start_app(tmp_path_factory.mktemp("app") / "home", **model_environment(tiny_model))


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HOME_DIR without an app, and this process's settings for the tiny model."""
    for name in [name for name in os.environ if name.startswith("QUIRE_")]:
        monkeypatch.delenv(name)
    for name, value in model_environment(tiny_model).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "home"


@pytest.fixture(scope="session")
def child_environment(tiny_model: Path) -> Callable[[Path], dict[str, str]]:
    """The environment of a child process with a HOME_DIR, set to the tiny model."""
    return lambda home: environment(home, **model_environment(tiny_model))


@pytest.fixture(scope="session")
def eventually() -> Callable[..., bool]:
    """Whether a condition comes true in time."""

    def wait(condition: Callable[[], bool], timeout_s: float = 15.0) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.02)
        return False

    return wait
