"""How an engine leaves: it is let alone until its last request has ended, and its memory goes back to the system.

Boundary: waiting and freeing. Which engine leaves is the host's decision.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.records import HealthState

if TYPE_CHECKING:
    from engine.worker import EngineWorker

GRACE_S = 1.0  # who asked for the worker just before the swap may still submit
_POLL_S = 0.05


def wait_until_idle(
    worker: EngineWorker, stop: threading.Event, still: Callable[[], bool] = lambda: True
) -> None:
    """Return when no request of `worker` is left and the grace time is over, when it is dead, or when `stop` is set.

    `still`: whether to wait on; asked at every look.
    """
    earliest = time.monotonic() + GRACE_S
    while still() and not stop.wait(_POLL_S):
        if worker.health().state is HealthState.DEAD:
            return
        if worker.num_live == 0 and time.monotonic() >= earliest:
            return


def give_memory_back() -> None:
    """Free what young reference cycles hold, and return freed pages to the system.

    An engine goes by its reference counts when it is closed. What the app froze at start-up stays frozen: walking it
    stopped every thread for 0.3 to 0.9 s and freed nothing more (2-core machine, November 2026).
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed weights in its arenas
        if trim is not None:
            trim(0)
