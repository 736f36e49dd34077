"""One rank of a tensor-parallel engine that is not the first: ``python -m engine.parallel.rank_process FD``.

It loads its part of the model, meets the others, and does what rank 0 says, until the socket ends: then it ends too, whatever it
is doing. Boundary: the loop; what is built is ``engine.build``'s, what runs is a ModelRunner like rank 0's.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from engine.build import load_follower
from engine.errors import EngineDeadError, EngineError
from engine.parallel.messages import Connect, Done, Failed, Reset, Sleep, Start
from engine.parallel.runner import FollowerRunner
from engine.plan import StepPlan

END_S = 5.0  # to give memory back once rank 0 is gone

log = logging.getLogger(__name__)


def main(fd: int) -> None:
    """Serve until rank 0 closes the socket. Exit code 1: something failed, and rank 0 was told."""
    end: Connection[Any, Any] = Connection(fd)
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read, args=(end, inbox), name="inbox", daemon=True).start()
    try:
        _serve(end, inbox)
    except Exception as error:  # the process's boundary: rank 0 tells the reason
        log.exception("a rank cannot go on")
        with suppress(OSError):
            end.send(Failed(_typed(error)))
        os._exit(1)  # other threads may wait for ranks that never come


def _serve(end: Connection[Any, Any], inbox: SimpleQueue[Any]) -> None:
    start = inbox.get()
    if start is None:
        return
    assert isinstance(start, Start), start
    make_runner = load_follower(start.asked, start.config, start.rank)
    end.send(Done())
    connect = inbox.get()
    if connect is None:
        return
    assert isinstance(connect, Connect), connect
    runner = make_runner(connect.meeting)
    del make_runner  # it knows the decoder, which a sleeping runner does not
    while (message := inbox.get()) is not None:
        _act(runner, message, end)
    runner.close()


def _act(runner: FollowerRunner, message: object, end: Connection[Any, Any]) -> None:
    if isinstance(message, StepPlan):
        runner.step(message)
        return
    try:
        if isinstance(message, Reset):
            runner.reset_rows()
        elif isinstance(message, Sleep):
            runner.sleep(message.level) if message.level else runner.wake_up()
        answer: Done | Failed = Done()
    except Exception as error:  # noqa: BLE001 - rank 0 decides what follows
        answer = Failed(_typed(error))
    end.send(answer)


def _read(end: Connection[Any, Any], inbox: SimpleQueue[Any]) -> None:
    """Hand messages on; when they end, have this process end soon, also in the middle of a step."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(end.recv())
    inbox.put(None)
    timer = threading.Timer(END_S, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _typed(error: Exception) -> EngineError:
    """The error as rank 0 can raise it; others may not survive being pickled."""
    return error if isinstance(error, EngineError) else EngineDeadError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
