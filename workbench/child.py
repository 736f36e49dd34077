"""One child process of the supervisor: its start, its process group, and how soon it is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import IO

_BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_STEADY_S = 60.0  # a child that lived so long starts its backoff anew


@dataclass(slots=True)
class Child:
    """One child process and its restarts."""

    name: str
    command: list[str]
    env: dict[str, str]
    pass_fds: tuple[int, ...] = ()
    output: IO[bytes] | None = None  # None: our own
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0
    restart_at: float | None = None

    def start(self) -> None:
        self.started_at = time.monotonic()
        self.restart_at = None
        self.process = subprocess.Popen(
            self.command, env=self.env, pass_fds=self.pass_fds, stdin=subprocess.DEVNULL,
            stdout=self.output, stderr=self.output, start_new_session=True,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal_group(self, sig: signal.Signals) -> bool:
        """Signal every process of the child's group; False when there is none left."""
        if self.process is None:
            return False
        self.process.poll()  # reap the leader: a zombie would count as alive
        try:
            os.killpg(self.process.pid, sig)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def group_alive(self) -> bool:
        if self.process is None:
            return False
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def has_come_up(self) -> None:
        """Its start succeeded: the waits between starts are for starts that fail, and begin anew."""
        self.failures = 0

    def plan_restart(self) -> float:
        """Seconds until the next start; more after each quick death."""
        if time.monotonic() - self.started_at > _STEADY_S:
            self.failures = 0
        delay = _BACKOFF_S[min(self.failures, len(_BACKOFF_S) - 1)]
        self.failures += 1
        self.restart_at = time.monotonic() + delay
        return delay
