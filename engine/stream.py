"""RequestStream: one request's output, read by one reader; StreamHub: hands each step's deltas to their streams.

The engine thread only appends what came and wakes whoever waits: a reader in a thread by its lock, all readers of one event
loop by a single ``call_soon_threadsafe``. Detokenization and the building of the Completion happen in the reader, and a
reader that lags costs memory, never the engine's time.

Boundary: delivery. Stepping, health and records are in ``engine.worker``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from engine.completion_builder import CompletionBuilder
from engine.detokenizer import IncrementalDetokenizer
from engine.records import Cohort, Completion, StreamDelta, TokenBatch
from engine.request import FinishReason, Request
from engine.sampling_params import SamplingParams
from engine.wakeups import LoopMailbox, LoopWaiter, ThreadQueue, ThreadWaiter


class RequestStream:
    """The output of one request as it comes. One reader: a thread or a task, iterating or waiting for the result.

    Iterating yields a StreamDelta for each step that added something, `text` filled in ("" while no whole character is
    certain); the last one has a `finish_reason`. Leaving the iteration early aborts the request.
    """

    def __init__(
        self,
        request: Request,
        hub: StreamHub,
        detokenizer: IncrementalDetokenizer | None,
        abort: Callable[[str], None],
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.prompt_token_ids = request.prompt_token_ids
        self.params: SamplingParams = request.params
        self.seed = request.seed
        self.completion: Completion | None = None  # set once the reader took the last delta
        self._hub = hub
        self._abort = abort
        self._builder = CompletionBuilder(request, detokenizer)
        # Appended by the engine thread, taken by the reader; a step's tokens are one object for all streams.
        self._deltas: deque[StreamDelta | TokenBatch] = deque()
        self._ended = False  # the last delta is in _deltas, or was
        self._waiter: ThreadWaiter | LoopWaiter | None = None  # set by the reader, woken by the engine thread

    def __iter__(self) -> Iterator[StreamDelta]:
        deltas = self._deltas
        try:
            while self.completion is None:
                while deltas:
                    yield self._next()
                if not self._ended:
                    self._wait(None, end_only=False)
        finally:
            self._abandon()

    async def __aiter__(self) -> AsyncIterator[StreamDelta]:
        deltas = self._deltas
        mailbox = self._hub.mailbox(asyncio.get_running_loop())
        try:
            while self.completion is None:
                while deltas:
                    yield self._next()
                if not self._ended:
                    waiter = LoopWaiter(mailbox, end_only=False)
                    self._waiter = waiter
                    if not deltas:  # a second look, see _wait
                        await waiter.future
        finally:
            self._abandon()

    def result(self, timeout_s: float | None = None) -> Completion:
        """Wait for the end and return everything. The request goes on when the time is up.

        Raises:
            TimeoutError: the request did not end within `timeout_s`.
        """
        if not self.wait(timeout_s):
            raise TimeoutError(f"request {self.request_id} did not end within {timeout_s} s")
        return self._finished()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end without taking anything; False when the time is up. Partial output wakes nobody."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._ended:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._wait(left, end_only=True):
                return False
        return True

    async def aresult(self) -> Completion:
        """As ``result``, on an event loop. Cancelling the wait aborts the request."""
        mailbox = self._hub.mailbox(asyncio.get_running_loop())
        try:
            while not self._ended:
                waiter = LoopWaiter(mailbox, end_only=True)
                self._waiter = waiter
                if not self._ended:
                    await waiter.future
            return self._finished()
        finally:
            self._abandon()

    async def timed_out(self) -> bool:
        """Wait until something came, which the reader still gets; whether it is the end of a request that waited too long."""
        mailbox = self._hub.mailbox(asyncio.get_running_loop())
        while not self._deltas:
            waiter = LoopWaiter(mailbox, end_only=False)
            self._waiter = waiter
            if not self._deltas:  # a second look, see _wait
                await waiter.future
        came = self._deltas[0]
        return isinstance(came, StreamDelta) and came.finish_reason is FinishReason.TIMEOUT

    @property
    def has_more(self) -> bool:
        """Whether something came that the reader has not taken."""
        return bool(self._deltas)

    def abort(self) -> None:
        """End the request soon; its reader gets a last delta with finish reason ABORT. Nothing happens after the end."""
        if not self._ended:
            self._abort(self.request_id)

    def drain(self) -> int:
        """Take in what has arrived, without waiting; the number of output tokens so far."""
        deltas = self._deltas
        if deltas:
            arrived = [self._take() for _ in range(len(deltas))]
            self._builder.add_all(arrived)
            if arrived[-1].finish_reason is not None:
                self.completion = self._builder.finish(arrived[-1])
        return self._builder.num_tokens

    # ── the reader's side ───────────────────────────────────────────────────────────────────────────────────────────

    def _take(self) -> StreamDelta:
        came = self._deltas.popleft()
        return came.delta_of(self.request_id) if isinstance(came, TokenBatch) else came

    def _next(self) -> StreamDelta:
        delta = self._builder.add(self._take())
        if delta.finish_reason is not None:
            self.completion = self._builder.finish(delta)
        return delta

    def _finished(self) -> Completion:
        self.drain()
        assert self.completion is not None, "the last delta was taken by another reader"
        return self.completion

    def _abandon(self) -> None:
        if self.completion is None:
            self.abort()

    def _wait(self, timeout_s: float | None, *, end_only: bool) -> bool:
        """Block until something (or the end) has arrived; False when the time is up."""
        waiter = ThreadWaiter(end_only)
        self._waiter = waiter
        # The engine thread appends first and looks for a waiter then: this second look closes the gap between the two.
        if self._ended or (self._deltas and not end_only):
            self._hub.threads.leave(waiter)
            return True
        try:
            return waiter.lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
        finally:
            self._hub.threads.leave(waiter)


class StreamHub:
    """All live streams of one engine: their deltas come from the engine thread, their readers are anywhere."""

    def __init__(self) -> None:
        self._streams: dict[str, RequestStream] = {}
        self._mailboxes: dict[asyncio.AbstractEventLoop, LoopMailbox] = {}
        self._mailbox_lock = threading.Lock()
        self.threads = ThreadQueue()
        # The last batch's requests and their streams, forgotten when one of them may have ended.
        self._cohort: Cohort | None = None
        self._cohort_streams: list[RequestStream] = []
        # Contended only when a worker that hangs is closed by someone else.
        self._publishing = threading.Lock()

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    def ids(self) -> list[str]:
        """The live requests."""
        return list(self._streams)

    def loras(self) -> dict[str, str | None]:
        """The live requests and the name of each one's adapter."""
        requests = [stream.request for stream in list(self._streams.values())]
        return {each.request_id: None if each.lora is None else each.lora.name for each in requests}

    def add(self, stream: RequestStream) -> None:
        self._streams[stream.request_id] = stream

    def mailbox(self, loop: asyncio.AbstractEventLoop) -> LoopMailbox:
        """The one door through which the engine thread wakes readers of that loop."""
        with self._mailbox_lock:
            found = self._mailboxes.get(loop)
            if found is None:
                for closed in [known for known in self._mailboxes if known.is_closed()]:
                    del self._mailboxes[closed]
                found = self._mailboxes[loop] = LoopMailbox(loop)
            return found

    def publish(self, deltas: Iterable[StreamDelta], tokens: TokenBatch | None = None) -> list[str]:
        """Append a step's tokens and deltas to their streams and wake the readers that wait.

        Returns:
            The requests whose reader's event loop is closed: nobody will ever read them.
        """
        awaited: list[RequestStream] = []
        with self._publishing:
            if tokens is not None:
                for stream in self._streams_of(tokens.cohort):
                    stream._deltas.append(tokens)
                    if stream._waiter is not None:
                        awaited.append(stream)
            for delta in deltas:
                found = self._streams.get(delta.request_id)
                if found is None:
                    continue
                found._deltas.append(delta)
                if delta.finish_reason is not None:
                    found._ended = True
                    del self._streams[delta.request_id]
                    self._cohort, self._cohort_streams = None, []
                if found._waiter is not None:
                    awaited.append(found)
            return self._wake(awaited) if awaited else []

    def _streams_of(self, cohort: Cohort) -> list[RequestStream]:
        if cohort is not self._cohort:
            self._cohort = cohort
            found = map(self._streams.get, cohort.request_ids)
            self._cohort_streams = [stream for stream in found if stream is not None]
        return self._cohort_streams

    def _wake(self, streams: list[RequestStream]) -> list[str]:
        """Wake the readers of streams to which something came; as `publish` returns."""
        threads: list[ThreadWaiter] = []
        mailboxes: set[LoopMailbox] = set()
        for stream in streams:
            # Waiters serve once and only the reader replaces them: clearing one here could lose its successor.
            waiter = stream._waiter
            if waiter is None or (waiter.end_only and not stream._ended):
                continue
            if waiter.woken:
                # A loop may be closed before its reader could take what woke it.
                if isinstance(waiter, LoopWaiter) and waiter.mailbox.loop.is_closed():
                    mailboxes.add(waiter.mailbox)
                continue
            waiter.woken = True
            if isinstance(waiter, ThreadWaiter):
                threads.append(waiter)
            else:
                waiter.mailbox.waiting.append(waiter.future)
                mailboxes.add(waiter.mailbox)
        if threads:
            self.threads.wake(threads)
        closed = [mailbox for mailbox in mailboxes if not mailbox.ring()]
        return [request_id for mailbox in closed for request_id in self._read_on(mailbox)]

    def _read_on(self, mailbox: LoopMailbox) -> list[str]:
        waiters = ((request_id, stream._waiter) for request_id, stream in list(self._streams.items()))
        return [
            name for name, waiter in waiters if isinstance(waiter, LoopWaiter) and waiter.mailbox is mailbox
        ]

    def end_all(self, reason: FinishReason, error: str | None, only: Iterable[str] | None = None) -> None:
        """Give live streams (or some) a last delta, so that no reader waits for an engine that is gone."""
        now = time.monotonic_ns()
        ids = self.ids() if only is None else list(only)
        self.publish(
            StreamDelta(request_id, (), finish_reason=reason, error=error, created_ns=now)
            for request_id in ids
        )
