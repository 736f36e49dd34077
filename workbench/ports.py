"""Binding a port, or saying who has it.

Boundary: one listening socket. Linux's /proc names the owner where it is ours to read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from workbench.errors import PortInUseError

_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


def bind(host: str, port: int, *, variable: str = "PORT") -> socket.socket:
    """A bound, not yet listening socket.

    Raises:
        PortInUseError: naming the port, its owner where known, and the variable that moves us.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio switches Nagle's algorithm off only then: without it a stream's first token
    # waits 40 ms for the peer's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise _error(host, port, variable, error) from error
    return listener


def check_free(host: str, port: int, *, variable: str) -> None:
    """Raise PortInUseError unless `port` could be bound now."""
    bind(host, port, variable=variable).close()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def owner_pid(port: int) -> int | None:
    """The process that listens on `port`, if this user may see it."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        if wanted & _open_files(name):
            return int(name)
    return None


def _open_files(pid: str) -> set[str]:
    """What a process's descriptors point to; nothing where it is not ours to see."""
    files = set()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed in between
                files.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    except OSError:
        pass
    return files


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes


def _error(host: str, port: int, variable: str, error: OSError) -> PortInUseError:
    if error.errno != errno.EADDRINUSE:
        return PortInUseError(
            f"port {port} on {host} cannot be bound: {error.strerror}", value=port, param=variable,
            remedy=f"Choose another one: {variable}={_suggestion(port)}.",
        )  # fmt: skip
    pid = owner_pid(port)
    by = f" by process {pid}" if pid is not None else ""
    return PortInUseError(
        f"port {port} is in use{by}", value=port, limit="a free port", param=variable,
        remedy=f"Stop it, or choose another one: {variable}={_suggestion(port)}.",
    )  # fmt: skip


def _suggestion(port: int) -> int:
    """The next port that is free now."""
    for candidate in range(port + 1, min(port + 200, 65536)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            return candidate
    return free_port()
