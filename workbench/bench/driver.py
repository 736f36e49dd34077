"""The load driver: sends a workload's requests as planned and records, request by request, what came when.

It runs in a thread with an event loop of its own, so that it works alike in a Job, in the terminal and in a notebook whose
main thread has a loop already, and so that Ctrl-C and a cancelled Job end it in order: requests that run are cut off, what
finished is kept.

It measures itself. `lateness`: how long after its planned time (open loop), or after the slot was free (closed loop), a request
went out. `loop_lag`: how late a timer of 10 ms fires. A generator that is late measures itself instead of the server, and the
report says so.

Boundary: sends and records. What the figures mean is `report`'s; which requests there are, `workload`'s.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from workbench.bench.http_stream import Answer, StreamClient
from workbench.bench.spec import BenchmarkSpec
from workbench.bench.target import Target
from workbench.bench.workload import PlannedRequest, Workload

CANCELLED = "cancelled"
_LAG_INTERVAL_S = 0.01
_PROGRESS_INTERVAL_S = 0.25
_FILES_BESIDE = 256
_SWITCH_INTERVAL_S = 5e-4


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """One request as the client saw it. Times are ``time.monotonic_ns()``."""

    index: int
    request_id: str
    planned_ns: int | None  # open loop: when it should have been sent
    ready_ns: int  # when it could be sent: its planned time, or when its slot was free
    sent_ns: int
    event_ns: tuple[int, ...]  # when each event that adds to the answer was read
    last_ns: int | None  # when the answer's last token, or its end, was read
    end_ns: int
    status: int | None
    finish_reason: str | None
    error: str | None  # why it failed; "cancelled" when the benchmark was ended
    asked_input_tokens: int | None
    asked_output_tokens: int
    num_input_tokens: int | None  # as the server counted
    num_cached_tokens: int | None
    num_output_tokens: int | None

    @property
    def first_ns(self) -> int | None:
        return self.event_ns[0] if self.event_ns else None


@dataclass(frozen=True, slots=True)
class DriverResult:
    """What a run gave, complete or cut off."""

    records: tuple[ClientRecord, ...]  # of the measured requests that were sent, in order of their end
    warmup: tuple[ClientRecord, ...]
    began_ns: int  # the first measured request could be sent
    ended_ns: int
    loop_lag_ms: tuple[float, ...]
    cancelled: bool


OnProgress = Callable[[Sequence[ClientRecord]], None]
ShouldStop = Callable[[], bool]


def drive(
    target: Target,
    spec: BenchmarkSpec,
    workload: Workload,
    *,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> DriverResult:
    """Run the workload; returns when all is answered, or soon after `should_stop` says so or Ctrl-C is pressed.

    `on_progress` sees the records so far, four times a second, in the caller's thread.
    """
    run = _Run(target, spec, workload)
    with _quiet_interpreter(), _many_files(workload):
        thread = threading.Thread(target=run.main, name="quire-bench", daemon=True)
        thread.start()
        while thread.is_alive():
            try:
                thread.join(_PROGRESS_INTERVAL_S)
                if on_progress is not None:
                    on_progress(run.records)
                if should_stop is not None and should_stop():
                    run.stop()
            except KeyboardInterrupt:
                run.stop()
    if run.failure is not None:
        raise run.failure
    return DriverResult(
        tuple(run.records),
        tuple(run.warmup),
        run.began_ns,
        time.monotonic_ns(),
        tuple(run.lag_ms),
        run.cancelled,
    )


class _Run:
    """One run; all but `stop` happens on the run's own thread."""

    def __init__(self, target: Target, spec: BenchmarkSpec, workload: Workload) -> None:
        self.records: list[ClientRecord] = []  # appended to only; the waiting thread reads it
        self.warmup: list[ClientRecord] = []
        self.lag_ms: list[float] = []
        self.began_ns = 0
        self.cancelled = False
        self.failure: BaseException | None = None
        self._target = target
        self._spec = spec
        self._workload = workload
        self._prefix = f"bench-{uuid.uuid4().hex[:10]}"
        self._client = StreamClient(target.base_url, target.headers, first_event_is_token=target.is_quire)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None

    def main(self) -> None:
        try:
            asyncio.run(self._all())
        except BaseException as error:  # noqa: BLE001 - the thread's boundary: raised again where the run was started
            self.failure = error

    def stop(self) -> None:
        """Cut off what runs. Any thread; repeated calls do nothing more."""
        self.cancelled = True
        loop, main = self._loop, self._main
        if loop is not None and main is not None:
            with suppress(RuntimeError):  # the loop has just ended
                loop.call_soon_threadsafe(main.cancel)

    async def _all(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.create_task(self._requests())
        if self.cancelled:
            self._main.cancel()
        try:
            await self._main
        except asyncio.CancelledError:
            if not self.cancelled:
                raise
        finally:
            self._client.close()

    async def _requests(self) -> None:
        at_once = self._workload.concurrency or max(len(self._workload.warmup), 1)
        await self._closed(self._workload.warmup, at_once, self.warmup)
        lag = asyncio.create_task(self._watch_lag())
        self.began_ns = time.monotonic_ns()
        try:
            if self._workload.concurrency is None:
                await self._open(self._workload.measured)
            else:
                await self._closed(self._workload.measured, at_once, self.records)
        finally:
            lag.cancel()

    async def _closed(
        self, requests: Sequence[PlannedRequest], at_once: int, into: list[ClientRecord]
    ) -> None:
        """So many at a time; each slot sends its next request when it has its answer."""
        waiting = iter(requests)

        async def slot() -> None:
            for request in waiting:
                await self._send(request, None, time.monotonic_ns(), into)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(requests))):
                group.create_task(slot())

    async def _open(self, requests: Sequence[PlannedRequest]) -> None:
        """Each at its time, whatever became of those before."""
        start_ns = self.began_ns
        async with asyncio.TaskGroup() as group:
            for request in requests:
                assert request.at_s is not None
                due_ns = start_ns + int(request.at_s * 1e9)
                wait_s = (due_ns - time.monotonic_ns()) / 1e9
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(self._send(request, due_ns, due_ns, self.records))

    async def _send(
        self, request: PlannedRequest, planned_ns: int | None, ready_ns: int, into: list[ClientRecord]
    ) -> None:
        body = self._target.body(
            request.messages, request.max_tokens, force=self._workload.forced_length,
            temperature=self._spec.temperature, stream=True,
        )  # fmt: skip
        body["seed"] = self._spec.seed
        request_id = f"{self._prefix}-{'w' if request.is_warmup else ''}{abs(request.index)}"
        answer = Answer(sent_ns=time.monotonic_ns())
        try:
            answer = await self._client.chat(body, request_id, self._spec.timeout_s)
        except asyncio.CancelledError:
            answer.error, answer.end_ns = CANCELLED, time.monotonic_ns()
            raise
        finally:
            into.append(_record(request, request_id, planned_ns, ready_ns, answer))

    async def _watch_lag(self) -> None:
        while True:
            due = time.monotonic() + _LAG_INTERVAL_S
            await asyncio.sleep(_LAG_INTERVAL_S)
            self.lag_ms.append(max(time.monotonic() - due, 0.0) * 1e3)


def _record(
    request: PlannedRequest, request_id: str, planned_ns: int | None, ready_ns: int, answer: Answer
) -> ClientRecord:
    usage = answer.usage or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    num_output = usage.get("completion_tokens")
    if num_output is None and answer.error is None:
        num_output = len(answer.event_ns)  # the server counts nothing: an event is a token, mostly
    told = [*answer.event_ns[-1:], *([answer.finish_ns] if answer.finish_ns else [])]
    error = answer.error
    if error is None and not num_output:
        error = "no tokens"
    return ClientRecord(
        index=request.index,
        request_id=request_id,
        planned_ns=planned_ns,
        ready_ns=ready_ns,
        sent_ns=answer.sent_ns,
        event_ns=tuple(answer.event_ns),
        last_ns=max(told) if told else None,
        end_ns=answer.end_ns,
        status=answer.status,
        finish_reason=answer.finish_reason,
        error=error,
        asked_input_tokens=request.asked_input_tokens,
        asked_output_tokens=request.max_tokens,
        num_input_tokens=usage.get("prompt_tokens"),
        num_cached_tokens=cached,
        num_output_tokens=num_output,
    )


@contextmanager
def _quiet_interpreter() -> Iterator[None]:
    """Keep this process's own pauses out of the run.

    A full collection walks everything that was imported, for tens of milliseconds; a busy thread (a notebook's, a page's) keeps
    the interpreter for the switch interval.
    """
    gc.collect()
    gc.freeze()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(min(interval, _SWITCH_INTERVAL_S))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()


@contextmanager
def _many_files(workload: Workload) -> Iterator[None]:
    """A connection is a file; the usual limit of 1,024 is below what an open loop may need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (workload.concurrency or len(workload.measured)) + _FILES_BESIDE
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if limit <= soft:
        yield
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
