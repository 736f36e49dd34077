"""EngineWorker: the one thread that steps an engine, and everything around it that others need to use it.

Requests, and what somebody waits for (sleep, adapters that come and go), come in through an inbox of picklable messages
(``engine.worker_messages``); answers go out through streams (``engine.stream``), records to sinks; statistics and health are
snapshots that nobody waits for. The thread does no tokenization, no detokenization, no logging and
no I/O, and sleeps on the inbox when there is nothing to do.

Failures: a sink that raises is removed; a step that fails is the engine's affair (its requests end with an error, others go
on); whatever escapes ``Engine.step`` (a broken device, a bug) ends all streams with an error, makes the worker DEAD and calls
`on_fatal`; a step that hangs is for others to see, who `give_up`. Dead workers are replaced, not revived.

Boundary: threads and delivery. What a step computes is ``engine.engine``'s.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, EngineDeadError, EngineError, InvalidRequestError
from engine.grammar import Compiled
from engine.lora import Lora
from engine.pooling import ModelPooling
from engine.queue_limit import Backlog, QueueLimit
from engine.record_log import RecordLog
from engine.records import (
    EngineEvent,
    EngineStats,
    Health,
    HealthState,
    RequestRecord,
    Sink,
    StepRecord,
)
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from engine.stream import RequestStream, StreamHub
from engine.structured_outputs import StructuredOutputsParams
from engine.worker_messages import Abort, Add, AddLora, Ask, Close, Lost, Message, RemoveLora, Sleep, Wish

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.engine import Engine, StepOutput
    from engine.tokenizer import TokenizerLike

SWITCH_INTERVAL_S = 1e-4  # how long a busy Python thread may keep the engine thread from the interpreter
STATS_INTERVAL_NS = 50_000_000
_GIVEN_UP_S = 0.5  # that a thread which was given up has to end in
STALL_AFTER_S = 60.0  # the first step of a model may compile kernels


class EngineWorker:
    """Owns the thread that steps `engine`. All public methods may be called from any thread.

    `on_fatal` is called once, on the dying thread or that of `give_up`, after all streams have ended. `stall_after_s`: how long
    work may wait without a step that succeeds before health says STALLED.
    """

    lora: str | None = None  # the adapter of requests that name none; a worker of a whole model has none

    def __init__(
        self,
        engine: Engine,
        *,
        on_fatal: Callable[[BaseException], None] | None = None,
        stall_after_s: float = STALL_AFTER_S,
    ) -> None:
        self.config: EngineConfig = engine.config
        self.tokenizer: TokenizerLike | None = engine.tokenizer
        self.vocab_size: int = engine.vocab_size
        self.pooling: ModelPooling = engine.pooling
        self._stats: EngineStats = engine.stats()
        self.records = RecordLog(engine.config.record_seconds, self._stats.num_blocks)
        self._engine: Engine | None = engine
        engine.on_lost = lambda error: self._inbox.put(Lost(error))
        self._on_fatal = on_fatal
        self._stall_after_ns = int(stall_after_s * 1e9)
        self._hub = StreamHub()
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._sinks: tuple[Sink, ...] = (self.records,)  # replaced, never changed
        self._lora_sinks: dict[str, tuple[Sink, ...]] = {}  # of one adapter's requests; likewise
        self._lock = threading.Lock()  # submissions in order; start and close
        self._thread: threading.Thread | None = None
        self._closing = False
        self._death: str | None = None  # why the engine takes no more requests
        self._given_up = False  # its thread may hang for ever
        self._dying = threading.Lock()  # taken once, by who ends it in disorder, and never given back
        self._working_since_ns: int | None = None  # None: idle
        self._last_step_ns: int | None = None
        self._next_stats_ns = 0
        num_slots = self._stats.num_blocks * self._stats.block_size
        self._queue_limit = QueueLimit.of(
            engine.config, num_slots or self._stats.max_num_seqs * self._stats.max_model_len
        )
        self._num_sent = self._num_seen = Backlog(0, 0)  # by submitters, under the lock; by the engine thread
        self._tickets = count()
        self._answers: dict[int, Future[Any]] = {}  # of those who wait for one

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Start the thread. A second call does nothing.

        Raises:
            EngineDeadError: the worker was closed.
        """
        with self._lock:
            self._refuse_if_dead()
            if self._thread is not None:
                return
            if sys.getswitchinterval() > SWITCH_INTERVAL_S:
                sys.setswitchinterval(SWITCH_INTERVAL_S)
            # A daemon, so that a forgotten worker cannot keep the interpreter from ending; atexit ends it in order.
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            atexit.register(self.close)
            self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Abort what runs, end the thread and close the engine. A second call does nothing.

        Raises:
            EngineDeadError: a step did not return within `timeout_s`; all streams have ended, the engine was not closed.
        """
        with self._lock:
            atexit.unregister(self.close)
            self._closing = True
            thread = self._thread
        if thread is not None:
            self._inbox.put(Close())
            if thread is threading.current_thread():
                return  # a finalizer or sink on the engine thread: it will see the message
            thread.join(_GIVEN_UP_S if self._given_up else timeout_s)
            if thread.is_alive():
                if self._given_up:
                    return  # its streams have ended, and nothing can end the thread
                self._die_quietly("the engine was closed while a step hung")
                raise EngineDeadError(
                    f"the engine thread did not end within {timeout_s} s; a step hangs",
                    limit=timeout_s,
                    remedy="End the process.",
                )
        # The thread closed the engine itself unless it never ran or died.
        engine, self._engine = self._engine, None
        if engine is not None:
            self._die_quietly(self._death or "the engine is closed")
            engine.close()

    def give_up(self, error: EngineDeadError) -> None:
        """Be dead with `error`, as if the step that runs had raised it, without waiting for that step; its thread ends if it
        ever returns.

        A second call does nothing.
        """
        self._given_up = True
        self._inbox.put(Lost(error))
        self._die(error)

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        lora: str | None = None,
        arrival_ns: int | None = None,
        priority: int = 0,
        client: str = "",
        timeout_s: float | None = None,
    ) -> RequestStream:
        """Queue a request; tokenization and all checks happen here, in the caller's thread.

        `lora`: the name of a loaded adapter; where that is removed before the engine sees the request, the stream ends with an
        error.
        `arrival_ns`: when it reached the server (``time.monotonic_ns``), where that was before this call: its TTFT counts
        from there.
        `priority`: lower runs earlier. `client`: whom it counts for; clients get fair shares.
        `timeout_s`: since `arrival_ns`, when it ends with TIMEOUT and what it has, whether it runs or waits.

        Raises:
            InvalidRequestError: the request can never run, or its id is in use.
            QueueFullError: as much waits as may wait.
            EngineDeadError: the engine takes no more requests.
        """
        token_ids, compiled = self._prompt_ids(prompt), self._grammar_of(params)
        with self._lock:
            stream = self._open_stream(
                token_ids,
                params,
                request_id,
                cache_salt,
                lora,
                arrival_ns,
                compiled,
                priority,
                client,
                timeout_s,
            )
            return self._queue([stream])[0]

    def compile_grammar(self, structured: StructuredOutputsParams) -> None:
        """Have a grammar ready, so that no request that names it waits; returns when it is, at once where it is known.

        Raises:
            InvalidParamsError: naming what cannot be compiled, or would not be enforced.
            EngineDeadError: the engine takes no more requests.
        """
        self._refuse_if_dead()
        assert self._engine is not None
        self._engine.grammars.compile(structured)

    def _grammar_of(self, params: SamplingParams) -> Compiled | None:
        """What the outputs follow; compiled before the lock is taken, which others wait for."""
        if params.structured_outputs is None:
            return None
        self._refuse_if_dead()
        assert self._engine is not None
        return self._engine.grammars.grammar_of(params)

    def submit_all(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        loras: Sequence[str | None] | None = None,
        request_ids: Sequence[str] | None = None,
        cache_salt: str = "",
        arrival_ns: int | None = None,
        priority: int = 0,
        client: str = "",
        timeout_s: float | None = None,
    ) -> list[RequestStream]:
        """Queue requests together: all are checked before any runs, and the first step sees all of them.

        A prompt whose params ask for n completions becomes n requests side by side, ``params.each()``; those behind the first
        take the prompt's KV from the prefix cache. `loras`: the adapter of each prompt; None: the base alone. `request_ids`: of
        each of these requests. The others are as in `submit`, for all of them.

        Raises:
            InvalidRequestError: one of them can never run, or its id is in use; none was queued.
            QueueFullError: as much waits as may wait; none was queued.
            EngineDeadError: the engine takes no more requests.
        """
        tokenized = [self._prompt_ids(prompt) for prompt in prompts]
        grammars = map(self._grammar_of, params)
        asked = zip(tokenized, params, loras or [None] * len(tokenized), grammars, strict=True)
        each = [(ids, one, lora, compiled) for ids, given, lora, compiled in asked for one in given.each()]
        names: Sequence[str | None] = request_ids or [None] * len(each)
        if len(names) != len(each):
            raise InvalidRequestError(
                f"{len(names)} ids were given for {len(each)} requests", value=len(names), limit=len(each),
                param="request_ids", remedy="Give one for each of params.each() of each prompt.",
            )  # fmt: skip
        with self._lock:
            return self._queue(
                [
                    self._open_stream(
                        ids, one, name, cache_salt, lora, arrival_ns, compiled, priority, client, timeout_s
                    )
                    for (ids, one, lora, compiled), name in zip(each, names, strict=True)
                ]
            )

    def _open_stream(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        cache_salt: str = "",
        lora: str | None = None,
        arrival_ns: int | None = None,
        compiled: Compiled | None = None,
        priority: int = 0,
        client: str = "",
        timeout_s: float | None = None,
    ) -> RequestStream:
        self._refuse_if_dead()
        if request_id is not None and request_id in self._hub:
            raise InvalidRequestError(
                f"request id {request_id!r} is in use",
                value=request_id,
                remedy="Give each request an id of its own.",
                param="request_id",
            )
        assert self._engine is not None
        request = self._engine.make_request(
            token_ids, params, request_id=request_id, cache_salt=cache_salt, lora=lora, arrival_ns=arrival_ns,
            compiled=compiled, priority=priority, client=client, timeout_s=timeout_s,
        )  # fmt: skip
        detokenizer = self.tokenizer.detokenizer(params.skip_special_tokens) if self.tokenizer else None
        return RequestStream(request, self._hub, detokenizer, self.abort)

    def _queue(self, streams: list[RequestStream]) -> list[RequestStream]:
        coming = Backlog(len(streams), sum(len(stream.prompt_token_ids) for stream in streams))
        self._queue_limit.enter(coming, self._waiting(), time.monotonic_ns())
        self._num_sent += coming
        for stream in streams:
            self._hub.add(stream)
        self._inbox.put(Add(tuple(stream.request for stream in streams)))
        if self._death is not None:  # died meanwhile: the streams that it ended may not include these
            self._hub.end_all(FinishReason.ERROR, self._death)
        return streams

    def _waiting(self) -> Backlog:
        """What waits for a row, here and in the engine; for a moment some may be counted twice, never left out."""
        engine, sent, seen = self._engine, self._num_sent, self._num_seen
        return sent - seen + (Backlog(0, 0) if engine is None else engine.backlog)

    @property
    def num_refused(self) -> int:
        """Requests that were refused because as much waited as may wait."""
        return self._queue_limit.num_refused

    @property
    def num_live(self) -> int:
        """Requests that have not ended, those included that the engine has not seen yet: its statistics lag by a step."""
        return len(self._hub.ids())

    def num_live_of(self, lora: str) -> int:
        """Those of them that carry the adapter of that name."""
        return list(self._hub.loras().values()).count(lora)

    def abort(self, request_id: str) -> None:
        """End a request soon; unknown and finished ids are ignored."""
        if request_id in self._hub:
            self._inbox.put(Abort(request_id))

    def abort_all(self, reason: str) -> None:
        """End all requests soon; their readers are told why."""
        for request_id in self._hub.ids():
            self._inbox.put(Abort(request_id, reason))

    # ── sleep ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def sleep(self, level: int = 1) -> None:
        """Give the device's memory back until `wake_up`, and return when that is done. See ``Engine.sleep``.

        Raises:
            EngineBusyError: there are requests, also those that were submitted just before.
            ConfigError: no such level.
            EngineDeadError: the worker is closed or dead.
        """
        if not level:
            raise ConfigError("there is no sleep level 0", value=level, limit="1, 2", param="level")
        self._ask(Sleep(level))

    def wake_up(self) -> None:
        """Take requests again; returns when the engine does. See ``Engine.wake_up``.

        Raises:
            OutOfMemoryError, ModelLoadError: the engine sleeps on.
            EngineDeadError: the worker is closed or dead.
        """
        self._ask(Sleep(0))

    def _ask(self, what: Wish) -> Any:
        """Have the engine thread do something, and wait for its answer."""
        answer: Future[Any] = Future()
        with self._lock:
            self._refuse_if_dead()
            ask = Ask(what, next(self._tickets))
            self._answers[ask.ticket] = answer
            if self._thread in (None, threading.current_thread()):  # nobody steps the engine meanwhile
                assert self._engine is not None
                self._act(self._engine, ask)
            else:
                self._inbox.put(ask)
        if self._death is not None:  # died meanwhile, perhaps without having read the message
            self._refuse_the_waiting(self._death)
        return answer.result()

    def _refuse_the_waiting(self, reason: str) -> None:
        while self._answers:
            with suppress(KeyError, InvalidStateError):  # somebody else answers too
                self._answers.popitem()[1].set_exception(
                    EngineDeadError(reason, remedy="Load the model again.")
                )

    def _prompt_ids(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise InvalidRequestError(
                "this engine has no tokenizer", remedy="Give token ids instead of text.", param="prompt"
            )
        return self.tokenizer.encode(prompt)

    def _refuse_if_dead(self) -> None:
        reason = self._death or ("the engine is closed" if self._closing else None)
        if reason is not None:
            raise EngineDeadError(reason, remedy="Load the model again.")

    # ── adapters ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The adapters that requests may name, oldest first."""
        engine = self._engine
        return () if engine is None else engine.loras

    def add_lora(self, name: str, folder: str | Path) -> Lora:
        """Load an adapter while requests run; its files are read and checked here, in the caller's thread.

        Raises:
            InvalidRequestError, ModelLoadError, OutOfMemoryError: as ``Engine.add_lora``; nothing has changed.
            EngineDeadError: the engine takes no more requests.
        """
        self._refuse_if_dead()
        assert self._engine is not None
        weights = self._engine.read_lora(folder)
        added: Lora = self._ask(AddLora(name, weights))
        return added

    def remove_lora(self, name: str) -> None:
        """Unload an adapter: its name is free at once, requests that carry it run to their end.

        Raises:
            InvalidRequestError: no adapter of that name is loaded.
            EngineDeadError: the engine takes no more requests.
        """
        self._ask(RemoveLora(name))

    # ── what others may look at ─────────────────────────────────────────────────────────────────────────────────────

    def stats(self) -> EngineStats:
        """Counters and gauges, at most 50 ms behind the newest step; exact when idle."""
        return self._stats

    def health(self) -> Health:
        """Whether the engine serves: idle, or a step succeeded lately."""
        last, since = self._last_step_ns, self.awaited_since_ns
        thread = self._thread
        if self._death is not None or self._closing:
            return Health(HealthState.DEAD, last, self._death or "closed")
        if thread is None:
            return Health(HealthState.STARTING, last, "not started")
        if not thread.is_alive():
            return Health(HealthState.DEAD, last, "the engine thread is gone")
        if since is not None:
            waited_ns = time.monotonic_ns() - since
            if waited_ns > self._stall_after_ns:
                return Health(HealthState.STALLED, last, f"no step succeeded for {waited_ns / 1e9:.0f} s")
        return Health(HealthState.HEALTHY, last, "asleep" if self._stats.is_sleeping else "")

    @property
    def awaited_since_ns(self) -> int | None:
        """Since when (``time.monotonic_ns``) a step that succeeds is due; None: nothing is to be computed."""
        last, since = self._last_step_ns, self._working_since_ns
        return None if since is None else max(since, last or 0)

    def add_sink(self, sink: Sink, *, lora: str | None = None) -> None:
        """Send every record from now on to `sink`, on the engine thread. One that raises is removed.

        `lora`: events, and the records of the requests that carry the adapter of this name, and no others.
        """
        with self._lock:
            if lora is None:
                self._sinks = (*self._sinks, sink)
            else:
                self._lora_sinks = {**self._lora_sinks, lora: (*self._lora_sinks.get(lora, ()), sink)}

    def remove_sink(self, sink: Sink) -> None:
        """Stop sending records to `sink`."""
        with self._lock:
            self._sinks = tuple(known for known in self._sinks if known is not sink)
            each = {
                lora: tuple(s for s in sinks if s is not sink) for lora, sinks in self._lora_sinks.items()
            }
            self._lora_sinks = {lora: sinks for lora, sinks in each.items() if sinks}

    # ── the engine thread ───────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        engine = self._engine
        assert engine is not None
        self._event("started", self.config.model)
        try:
            self._serve(engine)
            self._finish(engine)
        except BaseException as error:  # noqa: BLE001 - the thread's boundary: whatever ends it must end the streams too
            self._die(error)

    def _serve(self, engine: Engine) -> None:
        """Step until asked to close."""
        while True:
            if not engine.has_work:
                self._go_idle(engine)
                message = self._inbox.get()
                self._working_since_ns = time.monotonic_ns()
                if not self._handle(engine, message):
                    return
            while not self._inbox.empty():
                if not self._handle(engine, self._inbox.get()):
                    return
            if engine.has_work:
                self._take_in(engine, engine.step())

    def _handle(self, engine: Engine, message: Message) -> bool:
        """Act on one message; False for the last one."""
        if isinstance(message, Add):
            for request in message.requests:
                try:
                    engine.add(request)
                except EngineError as error:
                    self._hub.end_all(FinishReason.ERROR, str(error), only=[request.request_id])
                self._num_seen += Backlog(1, len(request.prompt_token_ids))
        elif isinstance(message, Abort):
            engine.abort(message.request_id, message.reason)
        elif isinstance(message, Ask):
            self._working_since_ns = None  # waking up and loading take what they take, and are no step
            self._act(engine, message)
            self._working_since_ns = time.monotonic_ns()
        elif isinstance(message, Lost):
            raise message.error
        else:
            return False
        return True

    def _act(self, engine: Engine, ask: Ask) -> None:
        answer = self._answers.pop(ask.ticket)
        try:
            done = self._do(engine, ask.what)
        except BaseException as error:
            answer.set_exception(error)
            if not isinstance(error, EngineError) or isinstance(error, EngineDeadError):
                raise
        else:
            answer.set_result(done)

    def _do(self, engine: Engine, what: Wish) -> Lora | None:
        if isinstance(what, AddLora):
            return engine.add_lora(what.name, what.weights)
        if isinstance(what, RemoveLora):
            engine.remove_lora(what.name)
            return None
        if what.level:
            engine.sleep(what.level)
        else:
            engine.wake_up()
        self._stats = engine.stats()
        self._event("asleep" if what.level else "awake", self.config.model)
        return None

    def _take_in(self, engine: Engine, output: StepOutput) -> None:
        """Hand a step's results out: first to the readers, who wait for them."""
        if output.requests:  # whoever has its result finds it counted
            self._stats = engine.stats()
        for request_id in self._hub.publish(output.others, output.tokens):
            engine.abort(request_id)
        record = output.record
        if record is not None:
            if record.error is not None:
                self._event("step_failed", record.error, tuple(request_id for request_id, _ in record.rows))
            elif record.rows:
                self._last_step_ns = record.ended_ns
            self._tell(record)
        for request in output.requests:
            self._tell(request)
        now = time.monotonic_ns()
        if now >= self._next_stats_ns:
            self._next_stats_ns = now + STATS_INTERVAL_NS
            self._stats = engine.stats()
            self._queue_limit.sample(self._waiting(), now)

    def _go_idle(self, engine: Engine) -> None:
        self._stats = engine.stats()
        self._working_since_ns = None
        self._queue_limit.forget_samples()

    def _finish(self, engine: Engine) -> None:
        """Orderly end: every live request is aborted and recorded, then the engine gives its memory back."""
        for request_id in self._hub.ids():
            engine.abort(request_id)
        while engine.has_work:
            self._take_in(engine, engine.step())
        self._die_quietly("the engine is closed")
        self._stats = engine.stats()
        engine.close()
        self._engine = None
        self._event("stopped", self.config.model)

    def _die(self, error: BaseException) -> None:
        """Disorderly end: whatever happened, no reader waits on. Once, on the engine's thread or on that of `give_up`."""
        if not self._dying.acquire(blocking=False):
            return
        reason = f"the engine stopped: {type(error).__name__}: {error}"
        running = self._hub.loras()
        self._death = reason
        self._hub.end_all(FinishReason.ERROR, reason)
        self._refuse_the_waiting(reason)
        self._event("dead", reason, tuple(running), tuple(running.values()))
        if self._on_fatal is not None:
            self._on_fatal(error)

    def _die_quietly(self, reason: str) -> None:
        self._death = reason
        self._hub.end_all(FinishReason.ABORT, reason)
        self._refuse_the_waiting(reason)

    def _tell(self, record: StepRecord | RequestRecord | EngineEvent) -> None:
        sinks = self._sinks
        if isinstance(record, RequestRecord) and record.lora is not None:
            sinks += self._lora_sinks.get(record.lora, ())
        elif isinstance(record, EngineEvent):
            sinks += tuple(sink for each in self._lora_sinks.values() for sink in each)
        for sink in sinks:
            try:
                if isinstance(record, StepRecord):
                    sink.on_step(record)
                elif isinstance(record, RequestRecord):
                    sink.on_request(record)
                else:
                    sink.on_event(record)
            except Exception as error:  # noqa: BLE001 - someone else's code: it must not take the engine down
                self.remove_sink(sink)
                self._event("sink_removed", f"{type(sink).__name__} raised {type(error).__name__}: {error}")

    def _event(
        self,
        kind: str,
        message: str = "",
        request_ids: tuple[str, ...] = (),
        loras: tuple[str | None, ...] = (),
    ) -> None:
        self._tell(EngineEvent(kind, time.monotonic_ns(), message, request_ids, loras))
