"""Child processes as users start them, and proof of what they leave behind."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from workbench.ports import free_port

ROOT = Path(__file__).resolve().parents[3]


class Quire:
    """One `quire` process with settings of its own."""

    def __init__(self, home: Path, *arguments: str, **environment: str) -> None:
        self.home = home
        self.port, self.mlflow_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("QUIRE_", "MLFLOW_"))}
        env = {
            **clean, "PORT": str(self.port), "MLFLOW_PORT": str(self.mlflow_port), "HOME_DIR": str(home),
            "PYTHONPATH": str(ROOT), "QUIRE_FAKE": "1", **environment,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workbench.cli", *arguments], env=env, cwd=home.parent, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._queue: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            self._queue.put(line)

    def wait_line(self, word: str, timeout_s: float = 90.0) -> str:
        """The next line that holds `word`."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = self._queue.get(timeout=min(left, 0.5))
            except queue.Empty:
                if self.process.poll() is not None and self._queue.empty():
                    break
                continue
            if word in line:
                return line.rstrip()
        raise AssertionError(f"no line with {word!r} in:\n" + "\n".join(self.lines))

    def get(self, path: str, timeout_s: float = 60.0) -> httpx.Response:
        return httpx.get(self.url + path, timeout=timeout_s)

    def app(self) -> dict[str, Any]:
        return dict(json.loads((self.home / "run" / "app.json").read_text()))

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> float:
        """Send `sig`; the seconds until the process ended."""
        started = time.monotonic()
        self.process.send_signal(sig)
        self.process.wait(30)
        return time.monotonic() - started

    def close(self) -> None:
        """End the process if it still runs, and read its output to the end."""
        if self.process.poll() is None:
            self.stop()
        self._reader.join(30)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def descendants(self) -> set[int]:
        return descendants(self.process.pid)


def descendants(pid: int) -> set[int]:
    """All living children, and theirs."""
    parents: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(entry.path, "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found: set[int] = set()
    todo = [pid]
    while todo:
        for child in parents.get(todo.pop(), ()):
            if child not in found:
                found.add(child)
                todo.append(child)
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that still run; a zombie does not."""
    running = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                running.add(pid)
        except OSError:
            continue
    return running


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture(scope="session")
def proc() -> Any:
    """The functions above, for tests."""

    class Functions:
        alive = staticmethod(alive)
        is_free = staticmethod(is_free)

        @staticmethod
        def eventually(condition: Callable[[], bool], timeout_s: float = 15.0) -> bool:
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline:
                if condition():
                    return True
                time.sleep(0.05)
            return False

    return Functions


@pytest.fixture
def quire(tmp_path: Path) -> Iterator[Callable[..., Quire]]:
    """Starts `quire` processes and ends them with the test."""
    started: list[Quire] = []

    def start(*arguments: str, home: str = "home", **environment: str) -> Quire:
        started.append(Quire(tmp_path / home, *arguments, **environment))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quire]:
    """A ready `quire up` without MLflow, shared by tests that only talk to it."""
    running = Quire(
        tmp_path_factory.mktemp("up") / "home", "up", MLFLOW_TRACKING_URI="http://127.0.0.1:9/none"
    )
    try:
        running.wait_line("is ready")
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quire]:
    """A ready `quire serve`, shared by tests that only talk to it."""
    quiet = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9/none", "QUIRE_FOLLOW": ""}
    running = Quire(tmp_path_factory.mktemp("served") / "home", "serve", **quiet)
    try:
        running.wait_line("is ready")
        yield running
    finally:
        running.close()
