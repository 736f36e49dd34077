"""Ticket: waits for one request's row to be written, in a thread or on an event loop.

Boundary: one wait. Who writes, and when, is `request_writer`'s.
"""

from __future__ import annotations

import asyncio
import threading


class Ticket:
    """Tells when the next row of one request is written. Forget it and nothing is kept."""

    __slots__ = ("__weakref__", "_event", "_loop", "_waiter", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._event = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None

    def wait(self, timeout_s: float) -> bool:
        """Block until the row survives this process, at most `timeout_s`; whether it does."""
        return self._event.wait(timeout_s)

    async def written(self, timeout_s: float) -> bool:
        """The same for an event loop."""
        self._loop = asyncio.get_running_loop()
        self._waiter = self._loop.create_future()
        if not self._event.is_set():
            try:
                await asyncio.wait_for(self._waiter, timeout_s)
            except TimeoutError:
                return False
        return True

    def written_now(self) -> None:
        self._event.set()
        loop, waiter = self._loop, self._waiter
        if loop is not None and waiter is not None:
            try:
                loop.call_soon_threadsafe(_resolve, waiter)
            except RuntimeError:
                return  # that loop is closed: nobody waits any more


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
