"""ProcessId: names one process so that no later one can be taken for it, and tells whether it still runs.

A pid alone is given out again; together with the machine, its boot and the process's start time it is not. Linux reads all of
that from /proc; elsewhere only the pid is compared.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process of one boot of one machine."""

    host: str
    boot: str
    pid: int
    started: str  # clock ticks since the boot

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        return cls(socket.gethostname(), _boot_id(), pid, _start_ticks(pid) or "")

    @classmethod
    def parse(cls, text: str) -> ProcessId:
        host, boot, pid, started = text.split("|")
        return cls(host, boot, int(pid), started)

    def __str__(self) -> str:
        return f"{self.host}|{self.boot}|{self.pid}|{self.started}"

    @property
    def is_local(self) -> bool:
        """Whether it could be seen from here at all."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Whether that very process runs on this machine. A zombie does not."""
        if not self.is_local or self.boot != _boot_id():
            return False
        ticks = _start_ticks(self.pid)
        return ticks is not None and ticks == self.started


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:13]
    except OSError:
        return ""


def _start_ticks(pid: int) -> str | None:
    """When the process started; "" where that cannot be read, None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _signalled(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _signalled(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except OSError:
        return None
    return ""
