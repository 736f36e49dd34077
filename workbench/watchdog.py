"""Watchdog: an engine whose step does not return takes its process down, so that its requests end and another can start.

A thread looks at each engine's last step that succeeded. When one has been due for too long, the traceback of every thread
goes to stderr, the engine is given up (``EngineWorker.give_up``: its streams end with the reason, readiness goes) and `on_fatal`
follows as for a broken device. What the watchdog counts is its own waking time: a process that was stopped, a machine that slept
and a clock that was set are no hang.

A step that hangs inside native code may keep the interpreter, and with it this thread. ``faulthandler``'s timer needs no
interpreter: where this thread does not come to run for too long, it writes the tracebacks and ends the process. It counts on
while a process is stopped.

Loading a model is no step. An engine's first step may compile kernels and gets longer.

Boundary: looking and deciding. Restarting is the supervisor's.
"""

from __future__ import annotations

import faulthandler
import logging
import threading
import time
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from engine.errors import EngineDeadError
from engine.records import HealthState

if TYPE_CHECKING:
    from engine.worker import EngineWorker

log = logging.getLogger(__name__)
FIRST_STEP_S = 1800.0  # at least, for the first step of an engine
_MAX_INTERVAL_S = 5.0
_STDERR = 2


class Watchdog:
    """Watches engines from `start` to `close`. `timeout_s`: how long a step may be due; 0: for ever, and nothing runs.

    `owns_process`: the process is the app's own and ends, with exit code 1, where its interpreter hangs.
    """

    def __init__(
        self, timeout_s: float, *, first_step_s: float = FIRST_STEP_S, owns_process: bool = False
    ) -> None:
        self._timeout_s = timeout_s
        self._owns_process = owns_process
        self._first_step_s = max(timeout_s, first_step_s)
        self._interval_s = min(_MAX_INTERVAL_S, timeout_s / 10)
        self._waits: WeakKeyDictionary[EngineWorker, _Wait] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, worker: EngineWorker) -> None:
        """Watch a worker until it is closed or dead."""
        with self._lock:
            self._waits[worker] = _Wait()

    def start(self) -> None:
        """Look from now on. A second call does nothing."""
        if self._timeout_s and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="quire-watchdog", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Look no more. A second call does nothing."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        try:
            self._put_off_the_end()
            while not self._closed.wait(self._interval_s):
                self._put_off_the_end()
                now = time.monotonic()
                # Of a longer absence (this process was stopped, or starved) only what two intervals are worth counts.
                passed, last = min(now - last, 2 * self._interval_s), now
                with self._lock:
                    waits = list(self._waits.items())
                for worker, wait in waits:
                    self._look(worker, wait, passed)
        finally:
            if self._owns_process:
                faulthandler.cancel_dump_traceback_later()

    def _put_off_the_end(self) -> None:
        if self._owns_process:
            faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=_STDERR)

    def _look(self, worker: EngineWorker, wait: _Wait, passed_s: float) -> None:
        waited_s = wait.add(worker.awaited_since_ns, passed_s)
        health = worker.health()
        limit_s = self._first_step_s if health.last_step_ns is None else self._timeout_s
        if waited_s < limit_s or health.state is HealthState.DEAD:
            return
        log.error("no step of %s succeeded for %.0f s: it is given up", worker.config.model, waited_s)
        if self._owns_process:
            faulthandler.dump_traceback(_STDERR)
        worker.give_up(
            EngineDeadError(
                f"no step succeeded for {waited_s:.0f} s",
                value=round(waited_s, 1),
                limit=limit_s,
                param="QUIRE_STEP_TIMEOUT_SECONDS",
                remedy="The log shows where it hangs. Raise QUIRE_STEP_TIMEOUT_SECONDS if steps may take so long.",
            )
        )


class _Wait:
    """How long one and the same step has been due, in the watchdog's own waking time."""

    __slots__ = ("_seconds", "_since_ns")

    def __init__(self) -> None:
        self._since_ns: int | None = None
        self._seconds = 0.0

    def add(self, since_ns: int | None, passed_s: float) -> float:
        """Seconds so far, where a step has been due since `since_ns` (None: none is)."""
        is_same = since_ns is not None and since_ns == self._since_ns
        self._seconds = self._seconds + passed_s if is_same else 0.0
        self._since_ns = since_ns
        return self._seconds
