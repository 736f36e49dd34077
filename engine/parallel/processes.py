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
        self._is_closing = False
        self._lock = threading.Lock()
        self._ends: list[Connection[Any, Any]] = []
        self._children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, self._size):
                self._start(rank)
            self.send_each([Start(rank, asked, config) for rank in range(1, self._size)])
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes of ranks 1, 2, …"""
        return tuple(child.pid for child in self._children)

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
        self.send_each([message] * len(self._ends))

    def send_each(self, messages: list[Any]) -> None:
        """Say something to each rank; one pickle for those who get the same."""
        if self._lost is not None:
            raise self._lost
        try:
            packed = {id(message): pickle.dumps(message, pickle.HIGHEST_PROTOCOL) for message in messages}
            for end, message in zip(self._ends, messages, strict=True):
                end.send_bytes(packed[id(message)])
        except OSError as error:
            raise self.reason(error) from error

    def await_all(self) -> None:
        """Wait for every rank's answer.

        Raises:
            EngineError: what one of them could not do; or EngineDeadError, that it ended. The others have answered.
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

    def reason(self, error: BaseException) -> EngineDeadError:
        """Why the ranks cannot go on, after `error` came out of a step or a message."""
        until = time.monotonic() + REASON_S
        while self._lost is None and time.monotonic() < until:
            self._read_last_words()
            time.sleep(0.01)
        with self._lock:
            if self._lost is None:
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                if "Timed out" in text or "timeout" in text.lower():
                    text = f"a rank of {self._size} took no part in a step for {self._timeout_s} s"
                else:
                    text = f"the step failed on rank 0 of {self._size}: {type(error).__name__}: {text}"
                self._lost = EngineDeadError(text, remedy=REMEDY)
            return self._lost

    def close(self) -> None:
        """End all ranks: those that serve give their memory back first. A second call does nothing."""
        with self._lock:
            is_orderly, self._is_closing = self._lost is None, True
        for end in self._ends:
            end.close()  # a rank that serves ends on that
        until = time.monotonic() + (CLOSE_S if is_orderly else 0)
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - time.monotonic()))
            child.kill()
            child.wait()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-m", "engine.parallel.rank_process", str(theirs.fileno())], pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt from the keyboard is this process's to answer
            )  # fmt: skip
        self._children.append(child)
        self._ends.append(Connection(ours.detach()))
        threading.Thread(target=self._watch, args=(rank, child), name=f"rank-{rank}", daemon=True).start()

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        with self._lock:
            if self._is_closing or self._lost is not None:
                return
            self._lost = lost = EngineDeadError(
                f"rank {rank} of {self._size} {_how_it_ended(code)}", value=code, remedy=REMEDY
            )
        if self.on_lost is not None:
            self.on_lost(lost)

    def _answer(self, end: Connection[Any, Any]) -> EngineError | None:
        try:
            answer = end.recv()
        except (EOFError, OSError) as error:
            return self.reason(error)
        if isinstance(answer, Failed):
            return answer.error if isinstance(answer.error, EngineError) else self._failed(end, answer)
        assert isinstance(answer, Done), answer
        return None

    def _failed(self, end: Connection[Any, Any], answer: Failed) -> EngineDeadError:
        rank, error = self._ends.index(end) + 1, answer.error
        text = f"rank {rank} of {self._size} failed: {type(error).__name__}: {error}"
        return EngineDeadError(text, remedy=REMEDY)

    def _read_last_words(self) -> None:
        """Take note of a rank that said why it could not go on."""
        for end in self._ends:
            with suppress(EOFError, OSError):
                if end.poll() and isinstance(said := end.recv(), Failed):
                    with self._lock:
                        self._lost = self._lost or self._failed(end, said)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
