"""A child that does not outlive its parent, and takes its own children with it.

``python -m workbench.guard PARENT_PID -- command …`` runs a command whose process tree is not ours (the MLflow server starts
further processes). The guard is asked to end (SIGTERM) when the parent dies, even by SIGKILL, and then ends the whole
process group; `die_with_parent` alone serves children that are our own code.

Linux only (prctl). Imports nothing of the project: it costs one small interpreter.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

_PR_SET_PDEATHSIG = 1
_GRACE_S = 5.0


def die_with_parent(parent_pid: int, sig: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send `sig` to this process when its parent ends; at once if it is gone already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), sig)


def run_guarded(command: list[str], parent_pid: int) -> int:
    """Run `command` in this process group until it ends or we are told to; its exit code."""
    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent_pid)
    child = subprocess.Popen(command)
    while not stopping:
        try:
            return child.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            continue
    return _end_group(child)


def _end_group(child: subprocess.Popen[bytes]) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    try:
        code = child.wait(timeout=_GRACE_S)
        time.sleep(0.1)  # grandchildren got the same signal
    except subprocess.TimeoutExpired:
        code = -int(signal.SIGKILL)
    if os.getpgid(0) == os.getpid():  # only a group of our own: never the terminal's
        os.killpg(0, signal.SIGKILL)
    return code


def main() -> int:
    parent, separator, *command = sys.argv[1:]
    if separator != "--" or not command:
        print("usage: python -m workbench.guard PARENT_PID -- command …", file=sys.stderr)
        return 2
    return run_guarded(command, int(parent))


if __name__ == "__main__":
    sys.exit(main())
