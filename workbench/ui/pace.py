"""What live pages may take from the engine beside them: how often they refresh, and the priority of their threads.

A fragment's rerun costs about 30 ms of processor time whatever it shows, and the decode steps that fall beside it wait for a
core when there is no free one. `python -m workbench.bench live` measures it.
"""

from __future__ import annotations

import os
import sys
import threading

from engine.device_choice import available_cores

FEW_CORES = 4  # below it the engine's own threads leave none free
STRETCH_ON_FEW_CORES = 2.5
NICE = 10


def every(seconds: float) -> float:
    """Seconds between two refreshes of a live part that would like `seconds`: longer where no core is free for them."""
    return seconds * STRETCH_ON_FEW_CORES if available_cores() < FEW_CORES else seconds


def yield_to_the_engine() -> None:
    """Lower the priority of this thread for good: beside a decode step it gets a core last."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        if os.getpriority(os.PRIO_PROCESS, thread) < NICE:
            os.setpriority(os.PRIO_PROCESS, thread, NICE)
