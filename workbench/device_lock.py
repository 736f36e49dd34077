"""The device has one owner: a lock on ``HOME_DIR/run/device-<id>.lock``, held by whoever has a model in memory.

The app holds it while it lives, a notebook or script that loads a model itself holds it instead. The kernel gives it back
when the process ends, however it ends, so that no stale file can block anybody.

Boundary: who may use the device. It loads nothing, and says nothing about memory.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from workbench.errors import WorkbenchError
from workbench.run_state import RunState


class DeviceBusyError(WorkbenchError):
    """Another process owns the device of this HOME_DIR."""

    code = "device_busy"

    def __init__(self, message: str, *, pid: int | None, address: str, remedy: str) -> None:
        super().__init__(message, value=pid, limit="one owner", remedy=remedy, param="HOME_DIR")
        self.pid = pid
        self.address = address  # of the owner's API; "" for an owner without one

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.message, self.pid, self.address, self.remedy)


class DeviceLock:
    """The lock of one device of one HOME_DIR. Not re-entrant: a second lock in this process is refused as well.

    `run_dir` must exist. `device` is the device's number; a machine without GPUs has the one device "0".
    """

    def __init__(self, run_dir: Path, device: str = "0") -> None:
        self._run_dir = run_dir
        self.device = device
        self.file = run_dir / f"device-{device}.lock"
        self._handle: int | None = None

    @property
    def held(self) -> bool:
        return self._handle is not None

    def acquire(self, address: str = "") -> Self:
        """Take the device, or fail at once. `address` is where others may attach to this owner.

        Raises:
            DeviceBusyError: naming the owner's process and address.
        """
        if self._handle is not None:
            raise self._busy()
        # Not O_TRUNC: until the lock is ours, the text is the owner's.
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise self._busy() from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "address": address}).encode(), 0)
        self._handle = handle
        return self

    def release(self) -> None:
        """Give the device back. A second call does nothing; the file stays, empty of an owner."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.ftruncate(handle, 0)
            os.close(handle)

    def __enter__(self) -> Self:
        return self if self.held else self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _busy(self) -> DeviceBusyError:
        pid, address = self._owner()
        where = f" at {address}" if address else ""
        return DeviceBusyError(
            f"device {self.device} of {str(self._run_dir.parent)!r} is in use by process {pid or 'unknown'}{where}",
            pid=pid,
            address=address,
            remedy="Attach to it with workbench.connect(), stop it, or use another HOME_DIR.",
        )

    def _owner(self) -> tuple[int | None, str]:
        """Process and address as the owner wrote them; the running app's where it has not yet."""
        try:
            owner = json.loads(self.file.read_text("utf-8"))
            pid, address = int(owner["pid"]), str(owner["address"])
        except (OSError, ValueError, LookupError, TypeError):
            pid, address = None, ""
        app = RunState(self._run_dir).read()
        if app is not None and pid in (None, app.pid):
            return app.pid, app.url
        return pid, address


def _rebuild(message: str, pid: int | None, address: str, remedy: str) -> DeviceBusyError:
    return DeviceBusyError(message, pid=pid, address=address, remedy=remedy)
