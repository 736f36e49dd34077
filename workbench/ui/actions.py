"""Actions: what a click started and takes a moment (load, promote, roll back), run off the script thread.

One action at a time for a key: a second click while it runs gives the same one. The last one of each key stays, with its
result or error, until the next of that key begins. Not for long work: that is a Job, which outlives the app.

Pages run at a low priority and threads inherit it, an engine's too that an action loads: actions are started by a thread that
was made before any page.

No Streamlit here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any

log = logging.getLogger(__name__)
SHORT_WAIT_S = 0.3  # most registry calls end within it, so that the page shows the outcome in the same run


class Action:
    """One running or ended action. Its thread writes; pages read."""

    def __init__(self, key: str, label: str) -> None:
        self.key = key
        self.label = label
        self.started = time.monotonic()
        self.result: Any = None
        self.error: Exception | None = None
        self.ended: float | None = None  # monotonic
        self._done = threading.Event()

    @property
    def running(self) -> bool:
        return not self._done.is_set()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, at the latest after `timeout_s`."""
        return self._done.wait(timeout_s)


class Actions:
    """The actions of one app. Make it where threads have the priority that actions shall have. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[str, Action] = {}
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._dispatch, name="quire-actions", daemon=True).start()

    def close(self) -> None:
        """Start no more; those that run go on."""
        self._asked.put(None)

    def start(
        self,
        key: str,
        label: str,
        function: Callable[[], Any],
        *,
        after: Callable[[], None] | None = None,
        wait_s: float = SHORT_WAIT_S,
    ) -> Action:
        """Run `function` in a thread and wait a moment for it; `after` runs when it has ended, well or not."""
        with self._lock:
            found = self._by_key.get(key)
            if found is None or not found.running:
                found = self._by_key[key] = Action(key, label)
                as_asked = partial(
                    copy_context().run, function
                )  # who acts is known in the caller's context alone
                self._asked.put(partial(_run, found, as_asked, after))
        found.wait(wait_s)
        return found

    def running(self) -> list[Action]:
        with self._lock:
            return [action for action in self._by_key.values() if action.running]

    def get(self, key: str) -> Action | None:
        with self._lock:
            return self._by_key.get(key)

    def lately(self, prefix: str, seconds: float) -> list[Action]:
        """Actions whose key begins so: running, failed, or ended well within `seconds`; oldest first."""
        with self._lock:
            found = [action for key, action in self._by_key.items() if key.startswith(prefix)]
        now = time.monotonic()
        shown = [a for a in found if a.running or a.error is not None or now - (a.ended or now) < seconds]
        return sorted(shown, key=lambda action: action.started)

    def dismiss(self, key: str) -> None:
        """Forget an ended action, so that its error is told no more."""
        with self._lock:
            found = self._by_key.get(key)
            if found is not None and not found.running:
                del self._by_key[key]

    def _dispatch(self) -> None:
        while (asked := self._asked.get()) is not None:
            threading.Thread(target=asked, name="quire-action", daemon=True).start()


def _run(action: Action, function: Callable[[], Any], after: Callable[[], None] | None) -> None:
    try:
        action.result = function()
    except Exception as error:  # noqa: BLE001 - the thread's boundary: the page shows it
        log.info("%s failed: %s", action.label, error)
        action.error = error
    finally:
        if after is not None:
            after()
        action.ended = time.monotonic()
        action._done.set()
