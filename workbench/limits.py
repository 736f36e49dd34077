"""What this machine can do, measured once and kept in ``HOME_DIR/limits.json``: the yardstick of the Engine page.

One entry for each machine, device, dtype, number of threads and size of what is read. It is measured while no request runs: by
`LimitKeeper` when the default engine has worked and is idle again, or when somebody asks; a request that comes ends it.

Boundary: when, and where it is kept. How rates are measured is ``engine.device_limits``, what follows from them
``engine.limits``.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.limits import Limits, working_set
from workbench.errors import HomeDirError, WorkbenchError

if TYPE_CHECKING:
    from engine.worker import EngineWorker

log = logging.getLogger(__name__)
FILE = "limits.json"
IDLE_S = 10.0  # without a request before the keeper measures
LOOK_EVERY_S = 5.0


class MachineBusyError(WorkbenchError):
    """The machine cannot be measured now: requests run on it."""

    code = "machine_busy"


class Conditions(BaseModel):
    """What limits depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    machine: str  # processor and cores, and the accelerators with their driver
    device: str
    dtype: str
    threads: int  # 0 on a GPU
    working_set_bytes: int


class MeasuredLimits(BaseModel):
    """Limits of some conditions, and when they were measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    conditions: Conditions
    bytes_s: float
    flops_s: float
    at: str  # UTC, ISO 8601

    @property
    def limits(self) -> Limits:
        found = self.conditions
        return Limits(self.bytes_s, self.flops_s, found.dtype, found.device, found.working_set_bytes)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: int = 1
    limits: list[MeasuredLimits] = []


def measure(
    device: str,
    dtype: str,
    weights_bytes: int,
    *,
    threads: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Limits:
    """Measure now, about a second on a CPU. Imports torch. `threads`: torch's from now on in this process; None: as they are.

    Raises:
        MachineBusyError: `should_stop` said so.
        RuntimeError: torch's own, such as out of memory beside a resident engine.
    """
    import torch

    from engine.device_limits import Interrupted, measure_limits

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return measure_limits(
            torch.device(device), getattr(torch, dtype), weights_bytes, should_stop=should_stop
        )
    except Interrupted:
        pass  # an error raised from here would hold on to what was being measured
    raise MachineBusyError(
        "a request came while the machine was measured", remedy="Measure when no request runs."
    )


class LimitStore:
    """The limits kept under a HOME_DIR. Thread-safe."""

    def __init__(self, home_dir: Path) -> None:
        self._path = home_dir / FILE
        self._measuring = threading.Lock()
        self._read: tuple[int, list[MeasuredLimits]] = (-1, [])  # when the file was written, and what it held

    def find(self, worker: EngineWorker) -> MeasuredLimits | None:
        """What was measured under the conditions of a worker's engine; None: nothing yet."""
        asked = self.conditions(worker)
        return next((each for each in self._kept() if each.conditions == asked), None)

    def measure(self, worker: EngineWorker) -> MeasuredLimits:
        """Measure under the conditions of a worker's engine, and keep it.

        Raises:
            MachineBusyError: requests run, or one came meanwhile.
            HomeDirError: it cannot be kept.
            RuntimeError: torch's own.
        """
        with self._measuring:
            if worker.num_live:
                raise MachineBusyError(
                    "the machine is measured while no request runs", value=worker.num_live, limit=0,
                    remedy="Wait until the engine is idle.",
                )  # fmt: skip
            asked = self.conditions(worker)
            found = measure(
                asked.device, asked.dtype, _weights_bytes(worker), should_stop=lambda: worker.num_live > 0
            )
            at = datetime.now(UTC).isoformat(timespec="seconds")
            measured = MeasuredLimits(conditions=asked, bytes_s=found.bytes_s, flops_s=found.flops_s, at=at)
            others = [each for each in self._kept() if each.conditions != asked]
            self._write([*others, measured])
            return measured

    def conditions(self, worker: EngineWorker) -> Conditions:
        """What limits of this worker's engine depend on."""
        config = worker.config
        kind = config.device.partition(":")[0]
        return Conditions(
            machine=self._machine,
            device=config.device,
            dtype=config.dtype,
            threads=0 if kind == "cuda" else config.num_threads or 0,
            working_set_bytes=working_set(kind, _weights_bytes(worker)),
        )

    @cached_property
    def _machine(self) -> str:
        from engine.bench.record import machine

        found: dict[str, Any] = machine()
        return ", ".join([f"{found['cpu']} × {found['cores']}", *found["accelerators"]])

    def _kept(self) -> list[MeasuredLimits]:
        try:
            written = self._path.stat().st_mtime_ns
        except OSError:
            return []
        if self._read[0] != written:
            try:
                kept = _File.model_validate_json(self._path.read_text("utf-8")).limits
            except (OSError, ValidationError) as error:
                log.warning("%s cannot be read, the machine is measured again: %s", self._path, error)
                kept = []
            self._read = (written, kept)
        return self._read[1]

    def _write(self, limits: list[MeasuredLimits]) -> None:
        aside = self._path.with_name(f".{FILE}.{os.getpid()}")
        try:
            aside.write_text(_File(limits=limits).model_dump_json(indent=1) + "\n", "utf-8")
            os.replace(aside, self._path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise HomeDirError(
                f"the measured limits cannot be kept: {error.strerror or error}", value=str(self._path),
                remedy="Free space there, or use another HOME_DIR.",
            ) from error  # fmt: skip


class LimitKeeper:
    """Measures by itself, once, when the default engine has computed something and has been idle for a while."""

    def __init__(
        self, find_worker: Callable[[], EngineWorker], store: LimitStore, *, idle_s: float = IDLE_S
    ) -> None:
        """`find_worker`: the default engine's; raises WorkbenchError while there is none."""
        self._find_worker = find_worker
        self._store = store
        self._idle_ns = int(idle_s * 1e9)
        self._look_every_s = min(LOOK_EVERY_S, idle_s)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quire-limits", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; a measurement under way ends first."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _run(self) -> None:
        while not self._closing.wait(self._look_every_s):
            try:
                if self._look():
                    return
            except MachineBusyError:
                continue
            except Exception as error:  # noqa: BLE001 - the thread's boundary: the page says "not measured yet"
                log.warning("the machine's limits could not be measured: %s", error)
                return

    def _look(self) -> bool:
        """Whether nothing is left to do."""
        try:
            worker = self._find_worker()
        except WorkbenchError:
            return False
        last = worker.records.last_step()
        if last is None or worker.num_live or time.monotonic_ns() - last.ended_ns < self._idle_ns:
            return False
        if not last.bytes_needed:  # a runner without a model, or a step that failed
            return False
        if self._store.find(worker) is None:
            self._store.measure(worker)
        return True


def _weights_bytes(worker: EngineWorker) -> int:
    memory = worker.stats().memory
    return 0 if memory is None else memory.weights_bytes
