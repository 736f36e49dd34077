"""RankProcesses: the other ranks of a tensor-parallel engine, as child processes of the one that rank 0 runs in.

Each child reads its messages from a socket of its own, whose end it sees when this process ends, however it does. A thread a
child waits for its end, so that a rank that is gone is known even while nothing is asked of it.

Boundary: processes and messages; no tensors. What a child does: ``engine.parallel.rank_process``.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from engine.config import EngineConfig
from engine.errors import EngineDeadError, EngineError
from engine.parallel.messages import Connect, Done, Failed, Start

CLOSE_S = 10.0  # for a rank to give its memory back
REASON_S = 2.0  # for the end of a rank to be known after a collective failed over it
REMEDY = "Load the model again; the log has what the rank wrote."
_ROOT = str(Path(__file__).resolve().parent.parent.parent)  # where `engine` is


class RankProcesses:
    """Ranks 1 … size - 1 of an engine, started at once. `on_lost` is called once, on a thread of its own, when one ends by itself."""

    def __init__(self, asked: EngineConfig, config: EngineConfig) -> None:
        self.on_lost: Callable[[EngineDeadError], None] | None = None
        self._size = config.tensor_parallel_size
        self._timeout_s = config.distributed_timeout_seconds
        self._folder = TemporaryDirectory(prefix="quire-ranks-")
        self._lost: EngineDeadError | None = None
        self._ended: dict[int, int] = {}  # exit codes of ranks, in the order of their ends
        self._is_closing = False
        self._lock = threading.Lock()
        self._ends: list[Connection[Any, Any]] = []
        self._children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, self._size):
                self._start(rank)
                self._ends[-1].send(Start(rank, asked, config))
        except BaseException:
            self.close()
            raise

    def connect(self) -> Path:
        """Wait until all ranks have loaded their parts, and have them meet; the file to meet them by.

        Raises:
            EngineError: what a rank could not do, or that it ended.
        """
        self.await_all()
        meeting = Path(self._folder.name) / "meeting"
        self.send(Connect(meeting))
        return meeting

    def send(self, message: object) -> None:
        """Say something to every rank.

        Raises:
            EngineDeadError: one of them is gone.
        """
        if self._lost is not None:
            raise self._lost
        packed = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            for end in self._ends:
                end.send_bytes(packed)
        except OSError as error:
            raise self.reason(error) from error

    def await_all(self) -> None:
        """Wait for every rank's answer.

        Raises:
            EngineError: what one of them could not do; or EngineDeadError, that it ended.
        """
        waiting, failed = list(self._ends), None
        while waiting:
            for end in wait(waiting):
                assert isinstance(end, Connection)
                waiting.remove(end)
                answer = self._answer(end)
                failed = failed or answer
                if isinstance(answer, EngineDeadError):
                    raise answer
        if failed is not None:
            raise failed

    def reason(self, error: BaseException | None = None) -> EngineDeadError:
        """Why the ranks cannot go on, after `error` came out of a step or a message, or after one ended."""
        until = time.monotonic() + REASON_S
        while not self._ended and time.monotonic() < until:
            time.sleep(0.01)
        with self._lock:
            if self._lost is None:
                self._lost = EngineDeadError(self._why(error), remedy=REMEDY)
            return self._lost

    def _why(self, error: BaseException | None) -> str:
        for rank, code in self._ended.items():  # the first that ended took the others with it
            said = self._last_words(rank)
            return f"rank {rank} of {self._size} {_how_it_ended(code) if said is None else f'failed: {said}'}"
        if isinstance(error, BlockingIOError) or "timed out" in str(error).lower():
            return f"a rank of {self._size} took no part in a step for {self._timeout_s} s"
        return f"a step failed on rank 0 of {self._size}: {type(error).__name__}: {error}"

    def close(self) -> None:
        """End all ranks: those that serve give their memory back first. A second call does nothing."""
        is_orderly, self._is_closing = self._lost is None, True
        for end in self._ends:
            end.close()  # a rank that serves ends on that
        until = time.monotonic() + (CLOSE_S if is_orderly else 0)
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - time.monotonic()))
            child.kill()
            child.wait()
        self.on_lost = None
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        # A rank that hangs reads nothing.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", self._timeout_s, 0))
        path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "engine.parallel.rank_process", str(theirs.fileno())], pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt from the keyboard is this process's to answer
            )  # fmt: skip
        self._children.append(child)
        self._ends.append(Connection(ours.detach()))
        threading.Thread(target=self._watch, args=(rank, child), name=f"rank-{rank}", daemon=True).start()

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        self._ended[rank] = code
        if not self._is_closing and len(self._ended) == 1:
            lost = self.reason()
            if self.on_lost is not None:
                self.on_lost(lost)

    def _answer(self, end: Connection[Any, Any]) -> EngineError | None:
        try:
            answer = end.recv()
        except (EOFError, OSError) as error:
            return self.reason(error)
        if isinstance(answer, Failed):
            return answer.error
        assert isinstance(answer, Done), answer
        return None

    def _last_words(self, rank: int) -> EngineError | None:
        """Why a rank that ended could not go on, if it said so."""
        end = self._ends[rank - 1]
        with suppress(EOFError, OSError):
            while end.poll():
                said = end.recv()
                if isinstance(said, Failed):
                    return said.error
        return None


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
