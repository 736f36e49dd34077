"""A client that does not read what is sent to it: how long a stream waits for it before it is cut.

The server's buffers bound what is sent and not read; behind them ``send`` waits, and the request's output would grow in memory
to its end. One task and one timer a stream, nothing a chunk.

Boundary: time. What is sent, and what ends with it, is ``workbench.api.generation``'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.types import Message, Send

STALLED_AFTER_S = 60.0


async def unless_stalled(
    answer: Callable[[Send], Coroutine[Any, Any, None]], send: Send, after_s: float
) -> bool:
    """Run `answer`, which gets its own `send`; False: a message was not taken for `after_s`, and it was cancelled."""
    since: float | None = None  # a message waits to be taken since then

    async def timed(message: Message) -> None:
        nonlocal since
        since = time.monotonic()
        await send(message)
        since = None

    task = asyncio.create_task(answer(timed))
    try:
        while not (await asyncio.wait({task}, timeout=after_s / 2))[0]:
            if since is not None and time.monotonic() - since >= after_s:
                return False
        await task
        return True
    finally:
        task.cancel()
