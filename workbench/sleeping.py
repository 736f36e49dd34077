"""Sleep and waking of resident engines: a model that sleeps stays registered and gives its device memory to the others.

Falling asleep, a model takes no new requests; when its running ones have ended, its engine sleeps, and what it had counts
as free. Requests do not wake it: others may have its memory, and at level 2 its weights are read again. They are refused with
the remedy; whoever loads or wakes it does.

Boundary: when, and the state of the slot. What an engine gives back at which level is ``Engine.sleep``'s.
"""

from __future__ import annotations

import threading

from engine.errors import ConfigError, EngineBusyError
from workbench.draining import give_memory_back, wait_until_idle
from workbench.memory_budget import check_wake
from workbench.resident import HostPhase, HostState
from workbench.resident_table import ResidentTable, Slot

LEVELS = (1, 2)
READY = HostState(HostPhase.READY, "Ready", 1.0)


class Sleeper:
    """Over a host's table and its locks: `lock` guards the table, `loading` is held while memory changes hands."""

    def __init__(
        self,
        table: ResidentTable,
        *,
        lock: threading.Lock,
        loading: threading.Lock,
        stopping: threading.Event,
        is_budgeted: bool,
    ) -> None:
        self._table = table
        self._lock = lock
        self._loading = loading
        self._stopping = stopping
        self._is_budgeted = is_budgeted

    def sleep(self, slot: Slot, level: int) -> None:
        """Let a ready model's requests end, then put its engine to sleep. Blocks; neither lock may be held.

        It stays awake where somebody wakes, unloads or closes it before its requests have ended.

        Raises:
            ConfigError: no such level, or a model that cannot sleep so deeply; it is ready again.
        """
        if level not in LEVELS:
            raise ConfigError(f"there is no sleep level {level!r}", value=level, limit="1, 2", param="level")
        falling = HostState(HostPhase.SLEEPING, "Running requests end first", 1.0)
        with self._lock:
            if not slot.state.ready:
                return
            slot.state = falling
        worker = slot.worker
        assert worker is not None, "a ready model has a worker"
        while slot.state is falling:
            wait_until_idle(worker, self._stopping, still=lambda: slot.state is falling)
            with self._loading:
                if slot.state is not falling or self._stopping.is_set():
                    return
                try:
                    worker.sleep(level)
                except EngineBusyError:  # somebody had asked for the worker before, and was slow
                    continue
                except BaseException:
                    self._set(slot, falling, READY)
                    raise
                slot.awake_ledger, slot.ledger = slot.ledger, worker.stats().memory
                self._set(slot, falling, HostState(HostPhase.SLEEPING, f"Asleep at level {level}", 1.0))
        give_memory_back()

    def wake(self, slot: Slot) -> None:
        """Have a model take requests again; one that is awake stays so. Blocks; `loading` must be held.

        Raises:
            OutOfMemoryError: others have the memory now; it sleeps on.
            ModelLoadError: its files are not what they were; it sleeps on.
        """
        asleep, worker = slot.state, slot.worker
        if asleep.phase is not HostPhase.SLEEPING:
            return
        assert worker is not None, "a model that sleeps has a worker"
        if slot.awake_ledger is not None and slot.ledger is not None and self._is_budgeted:
            others = {name: each for name, each in self._table.ledgers().items() if name != slot.id}
            check_wake(slot.id, slot.ledger, slot.awake_ledger, others)
        worker.wake_up()  # does nothing where it had not fallen asleep yet
        slot.ledger, slot.awake_ledger = slot.awake_ledger or slot.ledger, None
        self._set(slot, asleep, READY)

    def _set(self, slot: Slot, former: HostState, state: HostState) -> None:
        """Unless somebody closed or retired it meanwhile."""
        with self._lock:
            if slot.state is former:
                slot.state = state
