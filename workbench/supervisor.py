"""`quire up`: starts the app, a lean MLflow server and the scheduler, restarts what dies, and leaves nothing behind.

The supervisor binds the app's port itself and hands the socket down, so that the port is checked before any work and stays
ours while a new app starts. It makes the store's tables before any child opens it. Each child leads its own process group;
it is told to end when the supervisor does, even by SIGKILL (`workbench.guard`).

Boundary: processes and signals. It imports no model, no Streamlit and no MLflow.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, TextIO

from workbench import exit_codes
from workbench.child import Child
from workbench.errors import AlreadyRunningError
from workbench.logs import line_of
from workbench.ports import bind, check_free
from workbench.settings import Settings

_TERM_GRACE_S = 9.0  # beyond the grace of running requests, then SIGKILL
_MLFLOW_HEADSTART_S = 30.0  # MLflow's imports must not slow the first page and the model's load down
_MLFLOW_PROBE_S = 1.0


@dataclass(slots=True)
class Supervisor:
    """Runs until it is told to stop. `say` is where people read; `as_json` adds one object on stdout when all is up."""

    settings: Settings
    say: TextIO = field(default_factory=lambda: sys.stdout)
    as_json: bool = False
    _stopping: bool = False
    _exit_code: int = 0
    _wake: tuple[int, int] = (-1, -1)  # signals end the wait
    _reports: tuple[int, int] = (-1, -1)  # the app tells how far it is
    _app: Child | None = None
    _mlflow: Child | None = None
    _scheduler: Child | None = None
    _mlflow_due: float | None = None
    _mlflow_answers: bool = False
    _report_buffer: bytes = b""
    _reported: bool = False

    def run(self) -> int:
        """Supervise until SIGTERM, SIGINT or SIGHUP; the exit code.

        Raises:
            PortInUseError, AlreadyRunningError, StoreError: before anything is started.
        """
        with ExitStack() as held:
            listener = self._hold(held)
            self._install_signals()
            held.callback(signal.set_wakeup_fd, -1)
            held.callback(self._stop_children)
            self._start_app(listener)
            while not self._stopping:
                self._wait_for_news()
                self._tend()
        self._print("Quire has stopped.")
        return self._exit_code

    def _hold(self, held: ExitStack) -> socket.socket:
        """Take HOME_DIR, the ports and the pipes; all are given back when `held` ends."""
        settings = self.settings
        held.enter_context(_lock_home(settings.run_dir))
        listener = held.enter_context(bind(settings.host, settings.port))
        if not settings.mlflow_tracking_uri:
            check_free(settings.mlflow_host, settings.mlflow_port, variable="MLFLOW_PORT")
        self._wake, self._reports = os.pipe(), os.pipe()
        for end in (*self._wake, *self._reports):
            held.callback(os.close, end)
        _create_schema(settings)
        return listener

    def _start_app(self, listener: socket.socket) -> None:
        write_end = self._reports[1]
        env = {
            **self._own_env(),
            "QUIRE_LISTEN_FD": str(listener.fileno()),
            "QUIRE_READY_FD": str(write_end),
        }
        command = [sys.executable, "-m", "workbench.app"]
        self._app = Child("app", command, env, pass_fds=(listener.fileno(), write_end))
        self._app.start()
        self._print("Starting the app …")

    def _start_mlflow(self) -> None:
        self._mlflow_due = None
        folder = self.settings.home_dir / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        self._mlflow = Child(
            "MLflow",
            _mlflow_command(self.settings, folder),
            _mlflow_env(self.settings),
            output=self._log_file("mlflow"),
        )
        self._mlflow.start()

    def _start_scheduler(self) -> None:
        command = [sys.executable, "-m", "workbench.runs.scheduler"]
        self._scheduler = Child("scheduler", command, self._own_env(), output=self._log_file("scheduler"))
        self._scheduler.start()

    def _own_env(self) -> dict[str, str]:
        """The environment of a child that is our own code."""
        return {
            **os.environ,
            **self.settings.to_env(),
            "MLFLOW_TRACKING_URI": self.settings.mlflow_url,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "QUIRE_SUPERVISOR_PID": str(os.getpid()),
        }

    def _log_file(self, name: str) -> BinaryIO:
        logs = self.settings.home_dir / "logs"
        logs.mkdir(exist_ok=True)
        return (logs / f"{name}.log").open("ab")

    @property
    def _children(self) -> list[Child]:
        return [child for child in (self._scheduler, self._mlflow, self._app) if child is not None]

    def _wait_for_news(self) -> None:
        timeout = 1.0 if self._pending_work() else 30.0
        ready, _, _ = select.select([self._wake[0], self._reports[0]], [], [], timeout)
        if self._wake[0] in ready:
            os.read(self._wake[0], 512)
        if self._reports[0] in ready:
            self._read_app()

    def _pending_work(self) -> bool:
        """Whether something is due soon that no signal announces."""
        restart = any(child.restart_at is not None for child in self._children)
        starting = self._mlflow is not None and self._mlflow.alive and not self._mlflow_answers
        return restart or starting or self._mlflow_due is not None

    def _tend(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if self._stopping:
                break
            if child.restart_at is not None:
                if now >= child.restart_at:
                    child.start()
            elif not child.alive:
                self._bury(child)
        if self._mlflow_due is not None and now >= self._mlflow_due:
            self._start_mlflow()
        elif self._mlflow is not None and self._mlflow.alive and not self._mlflow_answers:
            self._probe_mlflow()

    def _bury(self, child: Child) -> None:
        assert child.process is not None
        code = child.process.returncode
        child.signal_group(signal.SIGKILL)  # what it left behind
        if child is self._app and code == exit_codes.BAD_INPUT:
            self._stopping, self._exit_code = (
                True,
                exit_codes.BAD_INPUT,
            )  # it has said what is wrong; again would be the same
            return
        delay = child.plan_restart()
        if child is self._mlflow:
            self._mlflow_answers = False
        self._print(f"The {child.name} process ended ({_how(code)}); starting it again in {delay:g} s.")

    def _read_app(self) -> None:
        self._report_buffer += os.read(self._reports[0], 4096)
        *lines, self._report_buffer = self._report_buffer.split(b"\n")
        for line in lines:
            self._on_app_event(json.loads(line))

    def _on_app_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "listening":
            self._print(f"Quire is at {self.settings.url} (the model is loading)")
            if not self.settings.mlflow_tracking_uri and self._mlflow is None:
                self._mlflow_due = time.monotonic() + _MLFLOW_HEADSTART_S
            return
        if kind == "loaded":
            if self._app is not None:
                self._app.has_come_up()
            self._print(f"{event['title']} is ready. API: {self.settings.url}/v1")
        elif kind == "failed":
            self._print(f"No model: {event['message']}")
        if self._mlflow_due is not None:
            self._mlflow_due = time.monotonic()
        if self._scheduler is None:  # not before: its imports would slow the model's load down
            self._start_scheduler()
        if self.as_json and not self._reported:
            self._reported = True
            facts = {
                "url": self.settings.url,
                "mlflow_url": self.settings.mlflow_url,
                "pid": os.getpid(),
                **event,
            }
            print(json.dumps(facts), flush=True)

    def _probe_mlflow(self) -> None:
        try:
            with urllib.request.urlopen(f"{self.settings.mlflow_url}/health", timeout=_MLFLOW_PROBE_S):
                self._mlflow_answers = True
        except (urllib.error.URLError, OSError):
            return
        self._print(f"MLflow is at {self.settings.mlflow_url}")

    def _stop_children(self) -> None:
        children = self._children
        for child in children:
            child.signal_group(signal.SIGTERM)
        deadline = time.monotonic() + self.settings.shutdown_grace_seconds + _TERM_GRACE_S
        while any(c.group_alive() for c in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        for child in children:
            child.signal_group(signal.SIGKILL)
            if child.process is not None:
                child.process.wait()
            if child.output is not None:
                child.output.close()

    def _install_signals(self) -> None:
        os.set_blocking(self._wake[1], False)
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(sig, self._on_stop)
        signal.signal(signal.SIGCHLD, _only_wake)

    def _on_stop(self, signum: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _print(self, text: str) -> None:
        print(line_of(self.settings.log_format, "quire", text), file=self.say, flush=True)


def _create_schema(settings: Settings) -> None:
    """Make the store's tables while nobody else uses them. Raises StoreError."""
    from workbench.store import open_store

    open_store(settings.home_dir).close()


def _mlflow_command(settings: Settings, folder: Path) -> list[str]:
    """A lean server: one worker, no job execution (5–8 s and 0.25–0.5 GB instead of 18–32 s and 2.9 GB)."""
    return [
        sys.executable, "-m", "workbench.guard", str(os.getpid()), "--",
        sys.executable, "-m", "mlflow", "server",
        "--host", settings.mlflow_host, "--port", str(settings.mlflow_port), "-w", "1",
        "--artifacts-destination", str(folder / "artifacts"),
        "--static-prefix", "/mlflow",
    ]  # fmt: skip


def _mlflow_env(settings: Settings) -> dict[str, str]:
    return {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": settings.mlflow_store,  # not an argument, which every user of the machine could read
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "50",
    }


def _lock_home(run_dir: Path) -> TextIO:
    """Hold HOME_DIR: two supervisors would write over each other's stores."""
    lock = (run_dir / "supervisor.lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        pid = lock.read().strip()
        lock.close()
        raise AlreadyRunningError(
            f"another `quire up` (process {pid or 'unknown'}) uses {str(run_dir.parent)!r}", value=pid, param="HOME_DIR",
            remedy="Stop it, or give this one its own HOME_DIR, PORT and MLFLOW_PORT.",
        ) from None  # fmt: skip
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return "the engine died" if code == exit_codes.ENGINE_DEAD else f"exit code {code}"


def _only_wake(signum: int, frame: FrameType | None) -> None:
    """The wake-up pipe has ended the wait."""
