"""The engine thread: what it refuses, what it survives, how it dies, and that nobody hangs when it does."""

from __future__ import annotations

import asyncio
import ctypes
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import (
    Engine,
    EngineConfig,
    EngineDeadError,
    EngineEvent,
    EngineWorker,
    FinishReason,
    HealthState,
    InvalidRequestError,
    PromptTooLongError,
    RequestRecord,
    RequestStream,
    SamplingParams,
    StepRecord,
)
from engine.fake_runner import FakeRunner, FakeTokenizer, expected_tokens
from engine.plan import KVSpec, StepResult
from engine.worker import SWITCH_INTERVAL_S
from engine.worker_messages import Abort, Add, Ask, Close, RemoveLora, Sleep

ROOT = Path(__file__).resolve().parents[3]
SHORT = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=900, temperature=0, ignore_eos=True)
MakeWorker = Callable[..., EngineWorker]


def eventually(holds: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def kinds(worker: EngineWorker) -> list[str]:
    return [event.kind for event in worker.records.events()]


class Gate(FakeRunner):
    """A runner whose steps hang until the gate opens."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.entered = threading.Event()
        self.opened = threading.Event()

    def collect(self) -> StepResult:
        self.entered.set()
        self.opened.wait(60)
        return super().collect()


class Nonsense(FakeRunner):
    """A runner with a bug: it answers with something that is no result."""

    def collect(self) -> StepResult:
        super().collect()
        return "nonsense"  # type: ignore[return-value]


def engine_on(runner: FakeRunner) -> Engine:
    tokenizer = FakeTokenizer()
    config = EngineConfig(
        model="fake", dtype="float32", device="cpu", num_blocks=64, max_model_len=1024, max_batched_tokens=512
    )
    return Engine(
        config, runner, kv_spec=KVSpec(1, 1, 1, 16, 4), eos_token_ids=tokenizer.eos_token_ids,
        vocab_size=tokenizer.vocab_size, tokenizer=tokenizer,
    )  # fmt: skip


def worker_on(runner: FakeRunner, **more: Any) -> EngineWorker:
    worker = EngineWorker(engine_on(runner), **more)
    worker.start()
    return worker


class Killed(FakeRunner):
    """A runner whose thread is told to exit in the middle of a step, once `killed` is set."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.killed = threading.Event()

    def collect(self) -> StepResult:
        if self.killed.is_set():
            raise SystemExit
        return super().collect()


def kill_idle(worker: EngineWorker) -> None:
    """Raise SystemExit inside the engine thread, as the interpreter lets a debugger do.

    The thread has to stand where it waits for a message: anywhere else, a destructor or the callback of a weak
    reference could be what the exception meets, and those swallow it.
    """
    thread = worker._thread
    assert thread is not None
    assert thread.ident is not None

    def waits() -> bool:
        frame = sys._current_frames().get(thread.ident or 0)
        return frame is not None and frame.f_code is EngineWorker._serve.__code__

    assert eventually(lambda: worker._working_since_ns is None and waits())
    assert (
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        == 1
    )


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_can_never_run_is_refused_at_once_and_leaves_nothing(make_worker: MakeWorker) -> None:
    worker = make_worker()
    with pytest.raises(PromptTooLongError) as caught:
        worker.submit([1] * 1024, SHORT)
    assert caught.value.limit == 1023
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        worker.submit([99999], SHORT)
    with pytest.raises(InvalidRequestError, match="no tokens"):
        worker.submit("", SHORT)
    with pytest.raises(PromptTooLongError):
        worker.submit_all([[1], [1] * 2000, [2]], [SHORT] * 3)
    assert len(worker._hub) == 0
    assert worker.stats().steps == 0


def test_an_id_can_be_used_again_once_its_request_ended(make_worker: MakeWorker) -> None:
    worker = make_worker(delay_s=0.002)
    stream = worker.submit([1], ENDLESS, request_id="mine")
    with pytest.raises(InvalidRequestError, match="mine"):
        worker.submit([1], SHORT, request_id="mine")
    stream.abort()
    assert stream.result(20).finish_reason is FinishReason.ABORT
    assert worker.submit([1], SHORT, request_id="mine").result(20).request_id == "mine"
    worker.abort("mine")
    worker.abort("never heard of")
    stream.abort()


def test_text_needs_a_tokenizer() -> None:
    config = EngineConfig(
        model="fake", dtype="float32", device="cpu", num_blocks=64, max_model_len=64, max_batched_tokens=64
    )
    engine = Engine(
        config, FakeRunner(64), kv_spec=KVSpec(1, 1, 1, 16, 4), eos_token_ids=frozenset(), vocab_size=256
    )
    worker = EngineWorker(engine)
    worker.start()
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        worker.submit("hello", SHORT)
    assert worker.submit([1], SHORT).result(20).text == ""
    worker.close()


def test_requests_queued_together_share_their_first_step(make_worker: MakeWorker) -> None:
    worker = make_worker()
    streams = worker.submit_all([[i + 1] for i in range(20)], [SHORT] * 20)
    for i, stream in enumerate(streams):
        assert stream.result(20).token_ids == tuple(expected_tokens([i + 1], 8, 256))
    assert len(worker.records.steps()[0].rows) == 20


def test_seeds_follow_the_order_of_submission(make_worker: MakeWorker) -> None:
    first, second = make_worker(), make_worker()
    seeds = [[worker.submit([1], SHORT).seed for _ in range(5)] for worker in (first, second)]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 5


def test_messages_can_be_sent_to_another_process(make_worker: MakeWorker) -> None:
    stream = make_worker().submit("hello", SHORT.with_(stop=("x",)))
    for message in (Add((stream.request,)), Abort("a"), Ask(Sleep(1), 3), Ask(RemoveLora("b"), 4), Close()):
        assert pickle.loads(pickle.dumps(message)) == message


# ── records, sinks, statistics, health ──────────────────────────────────────────────────────────────────────────────


class Collector:
    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.requests: list[RequestRecord] = []
        self.events: list[EngineEvent] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_request(self, record: RequestRecord) -> None:
        self.requests.append(record)

    def on_event(self, event: EngineEvent) -> None:
        self.events.append(event)


class Broken(Collector):
    def on_step(self, record: StepRecord) -> None:
        super().on_step(record)
        raise RuntimeError("disk full")


def test_a_sink_gets_every_record_until_it_is_removed(make_worker: MakeWorker) -> None:
    worker = make_worker()
    sink = Collector()
    worker.add_sink(sink)
    worker.submit([1], SHORT).result(20)
    assert eventually(lambda: len(sink.requests) == 1 and worker.stats().num_running == 0)
    assert sink.steps == worker.records.steps()
    assert sink.requests == worker.records.requests()
    assert len(sink.steps) == worker.stats().steps
    worker.remove_sink(sink)
    worker.submit([1], SHORT).result(20)
    assert eventually(lambda: len(worker.records.requests()) == 2)
    assert len(sink.requests) == 1


def test_a_sink_that_raises_is_removed_and_told_of(make_worker: MakeWorker) -> None:
    worker = make_worker()
    broken, sound = Broken(), Collector()
    worker.add_sink(broken)
    worker.add_sink(sound)
    assert worker.submit([1], SHORT).result(20).num_output_tokens == 8
    assert eventually(lambda: len(sound.requests) == 1)
    assert len(broken.steps) == 1
    assert broken.requests == []
    event = next(e for e in worker.records.events() if e.kind == "sink_removed")
    assert "Broken" in event.message
    assert "disk full" in event.message
    assert event in sound.events
    assert worker.health().ok


def test_statistics_are_exact_when_idle_and_waited_for_by_nobody() -> None:
    runner = Gate(64)
    worker = worker_on(runner)
    stream = worker.submit([1, 2, 3], SHORT)
    begun = time.monotonic()
    worker.stats(), worker.health(), worker.records.block_map()
    assert worker.stats().output_tokens == 0
    assert time.monotonic() - begun < 5  # the step hangs for as long as the gate is shut
    runner.opened.set()
    stream.result(20)
    assert eventually(lambda: worker.stats().num_running == 0)
    stats = worker.stats()
    assert (stats.prompt_tokens, stats.output_tokens, stats.finished) == (3, 8, {"length": 1})
    worker.close()


def test_health_tells_idle_stalled_and_dead_apart() -> None:
    runner = Gate(64)
    worker = EngineWorker(engine_on(runner), stall_after_s=0.05)
    assert worker.health().state is HealthState.STARTING
    worker.start()
    time.sleep(0.1)
    assert worker.health().ok  # idle, however long
    stream = worker.submit([1], SHORT)
    assert eventually(lambda: worker.health().state is HealthState.STALLED)
    assert "no step succeeded" in worker.health().message
    runner.opened.set()
    stream.result(20)
    assert eventually(lambda: worker.health().ok)
    assert worker.health().last_step_ns is not None
    worker.close()
    assert worker.health().state is HealthState.DEAD


def test_an_idle_worker_uses_no_processor_time(make_worker: MakeWorker) -> None:
    worker = make_worker()
    worker.submit([1], SHORT).result(20)
    assert worker._thread is not None
    assert worker._thread.ident is not None
    clock = time.pthread_getcpuclockid(worker._thread.ident)
    assert eventually(lambda: worker._working_since_ns is None)
    before = time.clock_gettime_ns(clock)
    time.sleep(0.3)
    used_ns = time.clock_gettime_ns(clock) - before
    assert used_ns < 1_000_000, "a loop that polls"


def test_the_interpreter_switches_often_enough(make_worker: MakeWorker) -> None:
    make_worker()
    assert sys.getswitchinterval() <= SWITCH_INTERVAL_S * 1.01


# ── failure ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_that_fails_takes_its_own_requests_and_no_others(make_worker: MakeWorker) -> None:
    # One row at a time: whoever waits is not in the step that fails.
    worker = make_worker({"max_num_seqs": 1}, fail_at={3: RuntimeError("device hiccup")})
    lost, saved = worker.submit_all([[1], [2]], [SHORT] * 2)
    completion = lost.result(20)
    assert completion.finish_reason is FinishReason.ERROR
    assert "device hiccup" in (completion.error or "")
    assert saved.result(20).token_ids == tuple(expected_tokens([2], 8, 256))
    assert "step_failed" in kinds(worker)
    assert worker.health().ok
    assert worker.submit([1], SHORT).result(20).num_output_tokens == 8
    assert eventually(lambda: worker.stats().num_running == 0)
    assert worker.stats().step_errors == 1


def check_death(
    worker: EngineWorker, streams: list[RequestStream], fatal: list[BaseException], cause: str
) -> None:
    for stream in streams:
        completion = stream.result(20)
        assert completion.finish_reason is FinishReason.ERROR
        assert cause in (completion.error or "")
    assert eventually(lambda: bool(fatal))
    health = worker.health()
    assert health.state is HealthState.DEAD
    assert cause in health.message
    with pytest.raises(EngineDeadError, match=cause):
        worker.submit([1], SHORT)
    with pytest.raises(EngineDeadError):
        worker.start()
    event = worker.records.events()[-1]
    assert event.kind == "dead"
    assert set(event.request_ids) == {stream.request_id for stream in streams}
    worker.close()
    worker.close()


def test_a_broken_device_ends_all_requests_and_the_worker() -> None:
    fatal: list[BaseException] = []
    runner = FakeRunner(64, fail_at={2: EngineDeadError("illegal memory access")})
    worker = worker_on(runner, on_fatal=fatal.append)
    streams = worker.submit_all([[1], [2]], [SHORT] * 2)
    check_death(worker, streams, fatal, "illegal memory access")
    assert isinstance(fatal[0], EngineDeadError)
    assert runner.closed


def test_a_bug_that_escapes_a_step_ends_all_requests_and_the_worker() -> None:
    fatal: list[BaseException] = []
    runner = Nonsense(64)
    worker = worker_on(runner, on_fatal=fatal.append)
    streams = worker.submit_all([[1], [2]], [SHORT] * 2)
    check_death(worker, streams, fatal, "AttributeError")
    assert runner.closed


@pytest.mark.parametrize("how", ["iterating", "waiting", "async"])
def test_readers_of_a_killed_worker_get_an_error(how: str) -> None:
    fatal: list[BaseException] = []
    runner = Killed(64, delay_s=0.002)
    worker = worker_on(runner, on_fatal=fatal.append)
    stream = worker.submit([1], ENDLESS)
    last: list[Any] = []

    async def read() -> None:
        async for delta in stream:
            last.append(delta.finish_reason)

    def wait() -> None:
        if how == "iterating":
            last.extend(delta.finish_reason for delta in stream)
        elif how == "waiting":
            last.append(stream.result().finish_reason)
        else:
            asyncio.run(read())

    reader = threading.Thread(target=wait, daemon=True)
    reader.start()
    assert eventually(lambda: len(worker.records.steps()) > 3)
    runner.killed.set()
    reader.join(20)
    assert not reader.is_alive(), "the reader hangs"
    assert last[-1] is FinishReason.ERROR
    check_death(worker, [stream], fatal, "SystemExit")


def test_a_worker_killed_while_idle_fails_the_next_request() -> None:
    fatal: list[BaseException] = []
    worker = worker_on(FakeRunner(64), on_fatal=fatal.append)
    kill_idle(worker)
    check_death(worker, [worker.submit([1], SHORT)], fatal, "SystemExit")


def test_submitting_while_the_engine_dies_never_hangs() -> None:
    for delay in range(12):
        worker = worker_on(FakeRunner(64, fail_at={1: EngineDeadError("gone")}))
        worker.submit([1], SHORT)
        streams = []
        try:
            for i in range(200):
                streams.append(worker.submit([i + 1], SHORT))
                if i == delay:
                    time.sleep(0.0005)
        except EngineDeadError:
            pass
        for stream in streams:
            assert stream.result(20).finish_reason is FinishReason.ERROR
        worker.close()


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_closing_aborts_what_runs_and_frees_everything(make_engine: Callable[..., Engine]) -> None:
    before = threading.active_count()
    engine = make_engine(delay_s=0.002)
    worker = EngineWorker(engine)
    worker.start()
    running = worker.submit_all([[i + 1] for i in range(5)], [ENDLESS] * 5)
    assert eventually(lambda: len(worker.records.steps()) > 2)
    late = worker.submit([9], ENDLESS)
    worker.close()
    for stream in (*running, late):
        assert stream.result(1).finish_reason is FinishReason.ABORT
    assert threading.active_count() == before
    assert engine._runner.closed  # type: ignore[attr-defined]
    engine.check_integrity()
    assert {record.finish_reason for record in worker.records.requests()} == {FinishReason.ABORT}
    assert worker.stats().num_running == 0
    assert kinds(worker) == ["started", "stopped"]
    with pytest.raises(EngineDeadError, match="closed"):
        worker.submit([1], SHORT)
    with pytest.raises(EngineDeadError):
        worker.start()
    worker.close()


def test_a_worker_that_never_started_can_be_closed(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    worker = EngineWorker(engine)
    stream = worker.submit([1], SHORT)
    worker.close()
    assert stream.result(1).finish_reason is FinishReason.ABORT
    assert engine._runner.closed  # type: ignore[attr-defined]


def test_closing_a_worker_whose_step_hangs_says_so_and_frees_the_readers() -> None:
    runner = Gate(64)
    worker = worker_on(runner)
    stream = worker.submit([1], SHORT)
    assert runner.entered.wait(20)
    with pytest.raises(EngineDeadError, match="a step hangs"):
        worker.close(timeout_s=0.1)
    assert stream.result(1).finish_reason is FinishReason.ABORT
    runner.opened.set()
    worker.close()
    assert runner.closed


def test_closing_from_the_engine_thread_does_not_wait_for_itself() -> None:
    worker = worker_on(FakeRunner(64))

    class Closer(Collector):
        def on_request(self, record: RequestRecord) -> None:
            worker.close()

    worker.add_sink(Closer())
    worker.submit([1], SHORT).result(20)
    assert worker._thread is not None
    worker._thread.join(20)
    assert not worker._thread.is_alive()
    assert kinds(worker) == ["started", "stopped"]


def test_a_forgotten_worker_does_not_keep_the_interpreter_from_ending() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/engine/front')\n"
        "from test_worker import worker_on, FakeRunner, ENDLESS\n"
        "worker = worker_on(FakeRunner(64, delay_s=0.002))\n"
        "print(next(iter(worker.submit([1], ENDLESS))).token_ids[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected_tokens([1], 1, 256)[0]}\n", "")
