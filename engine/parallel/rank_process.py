"""One rank of a tensor-parallel engine that is not the first: ``python -m engine.parallel.rank_process FD``.

It loads its part of the model, meets the others, and does what rank 0 says, until the socket ends: then it ends too, whatever it
is doing. Boundary: the loop; what is built is ``engine.build``'s, what runs is a ModelRunner like rank 0's.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from engine.build import load_part, make_ready_runner
from engine.errors import EngineDeadError, EngineError
from engine.memory import CudaAllocator
from engine.model_folder import find_model
from engine.models.shard import shard_of
from engine.models.transformers_config import read_model_config
from engine.models.weights import load_weights
from engine.parallel.messages import Connect, Done, Failed, Reset, Sleep, Start
from engine.parallel.runner import FollowerRunner
from engine.parallel.settings import device_of
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
    meet = _load(start)
    end.send(Done())
    connect = inbox.get()
    if connect is None:
        return
    assert isinstance(connect, Connect), connect
    runner = meet(connect.meeting)
    del meet  # it knows the decoder, which a sleeping runner does not
    while (message := inbox.get()) is not None:
        _act(runner, message, end)
    runner.close()


def _load(start: Start) -> Callable[[Path], FollowerRunner]:
    """Load this rank's part; what comes back meets the other ranks by a file, and gives the runner."""
    device = device_of(start.rank, torch.device(start.config.device))
    config, folder = replace(start.config, device=str(device)), find_model(start.config.model)
    model = read_model_config(folder, trust_remote_code=config.trust_remote_code)
    shard = shard_of(model, start.rank, config.tensor_parallel_size)
    loaded = load_part(start.asked, config, shard, folder, load_weights, _tell_nobody)
    allocator = CudaAllocator(device) if device.type == "cuda" else None

    def meet(meeting: Path) -> FollowerRunner:
        assert loaded.ranks is not None
        loaded.ranks.connect(meeting)
        return FollowerRunner(make_ready_runner(loaded, allocator, _tell_nobody).runner, loaded.ranks)

    return meet


def _tell_nobody(message: str, share: float) -> None:
    pass


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
