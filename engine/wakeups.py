"""Waking readers: threads one after another, all readers of one event loop by one callback.

A waiter serves once: the reader makes it, the engine thread wakes it. Boundary: no tokens, no requests (``engine.stream``).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque

CHAIN_PATIENCE_S = 1.0


class ThreadWaiter:
    """A reader that blocks in a thread, on a lock that is released once."""

    __slots__ = ("end_only", "left", "lock", "released", "woken")

    def __init__(self, end_only: bool) -> None:
        self.end_only = end_only
        self.woken = False  # queued to be released
        self.released = False
        self.left = False  # does not wait any more
        self.lock = threading.Lock()
        self.lock.acquire()


class LoopWaiter:
    """A reader that awaits on an event loop."""

    __slots__ = ("end_only", "future", "mailbox", "woken")

    def __init__(self, mailbox: LoopMailbox, *, end_only: bool) -> None:
        self.end_only = end_only
        self.woken = False
        self.mailbox = mailbox
        self.future: asyncio.Future[None] = mailbox.loop.create_future()


class ThreadQueue:
    """Releases blocked threads one after another: each, once awake, releases the next.

    Released all at once, hundreds of threads would fight for the interpreter lock, and for the engine thread that would
    cost more than the step itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[ThreadWaiter] = deque()
        # When the thread was released that has yet to release its successor; None: there is none such.
        self._released_at: float | None = None

    def wake(self, waiters: list[ThreadWaiter]) -> None:
        """Queue these threads; begin with the first unless a chain is under way."""
        with self._lock:
            self._queue.extend(waiters)
            now = time.monotonic()
            # A thread that was killed in its sleep breaks the chain: after a while it is begun anew.
            if self._released_at is None or now - self._released_at > CHAIN_PATIENCE_S:
                self._release_next(now)

    def leave(self, waiter: ThreadWaiter) -> None:
        """The waiter's thread is awake, for whatever reason: if it was released, the next one's turn has come."""
        with self._lock:
            waiter.left = True
            if waiter.released:
                self._release_next(time.monotonic())

    def _release_next(self, now: float) -> None:
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.left:
                waiter.released = True
                self._released_at = now
                waiter.lock.release()
                return
        self._released_at = None


class LoopMailbox:
    """Futures of one event loop that the engine thread wants resolved: one callback for all of a step's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.waiting: deque[asyncio.Future[None]] = deque()
        self._rung = False

    def ring(self) -> bool:
        """Have the loop resolve what waits; False when the loop is closed."""
        if self.loop.is_closed():
            return False
        if self._rung:  # a callback is under way and has not begun: it will see these futures too
            return True
        self._rung = True
        try:
            self.loop.call_soon_threadsafe(self._resolve)
        except RuntimeError:  # closed just now
            return False
        return True

    def _resolve(self) -> None:
        self._rung = False  # before looking: what is appended from here on rings again
        waiting = self.waiting
        while waiting:
            future = waiting.popleft()
            if not future.done():
                future.set_result(None)
