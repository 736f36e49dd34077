"""Sleep through the worker: from any thread, never under requests, and nobody waits for an engine that died."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from engine import (
    LLM,
    ConfigError,
    EngineAsleepError,
    EngineBusyError,
    EngineDeadError,
    EngineWorker,
    FinishReason,
    HealthState,
    SamplingParams,
)
from engine.fake_runner import FakeRunner, expected_tokens
from engine.worker_messages import Add

PROMPT = [1, 2, 3] * 20
SHORT = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
MakeWorker = Callable[..., EngineWorker]


def test_it_sleeps_and_answers_as_before(make_worker: MakeWorker) -> None:
    llm = LLM.from_worker(make_worker())
    expected = expected_tokens(PROMPT, 8, 256)
    for level in (1, 2):
        assert list(llm.generate(PROMPT, SHORT, use_tqdm=False)[0].token_ids) == expected
        llm.sleep(level)
        assert llm.stats().is_sleeping
        assert llm.worker.health().ok
        assert llm.worker.health().message == "asleep"
        with pytest.raises(EngineAsleepError):
            llm.generate(PROMPT, SHORT, use_tqdm=False)
        llm.wake_up()
        assert not llm.stats().is_sleeping
        assert llm.worker.health().message == ""
    completion = llm.generate(PROMPT, SHORT, use_tqdm=False)[0]
    assert (list(completion.token_ids), completion.num_cached_tokens) == (expected, 0)
    kinds = [event.kind for event in llm.worker.records.events()]
    assert kinds == ["started", *["asleep", "awake"] * 2]


def test_it_is_refused_while_a_request_runs_which_goes_on(make_worker: MakeWorker) -> None:
    worker = make_worker(delay_s=0.005)
    stream = worker.submit(PROMPT, SHORT.with_(max_tokens=100))
    with pytest.raises(EngineBusyError):
        worker.sleep()
    assert stream.result().finish_reason is FinishReason.LENGTH
    with pytest.raises(ConfigError):
        worker.sleep(0)
    with pytest.raises(ConfigError):
        worker.sleep(7)
    worker.sleep()
    worker.wake_up()


def test_a_request_that_comes_with_the_sleep_ends_with_an_error(make_worker: MakeWorker) -> None:
    worker = make_worker()
    stream = worker._open_stream(PROMPT, SHORT)  # checked while the engine was awake
    worker.sleep()
    worker._hub.add(stream)
    worker._inbox.put(Add((stream.request,)))
    completion = stream.result()
    assert completion.finish_reason is FinishReason.ERROR
    assert "wake_up()" in str(completion.error)


def test_a_sleeping_worker_closes(make_worker: MakeWorker) -> None:
    worker = make_worker()
    worker.sleep(2)
    worker.close()
    assert worker.health().state is HealthState.DEAD
    with pytest.raises(EngineDeadError):
        worker.wake_up()


@pytest.mark.parametrize("error", [EngineDeadError("the device context is broken"), RuntimeError("a bug")])
def test_who_wakes_a_broken_engine_hears_it_and_so_does_everybody_else(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fatal = threading.Event()
    worker = make_worker(worker={"on_fatal": lambda _: fatal.set()})
    worker.sleep()

    def fail(self: FakeRunner) -> None:
        raise error

    monkeypatch.setattr(FakeRunner, "wake_up", fail)
    with pytest.raises(type(error), match=str(error)):
        worker.wake_up()
    assert fatal.wait(20)
    with pytest.raises(EngineDeadError):
        worker.wake_up()


def test_whoever_waits_for_a_hung_engine_hears_that_it_was_closed(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, opened = threading.Event(), threading.Event()

    def hang(self: FakeRunner, level: int) -> None:
        entered.set()
        opened.wait(60)

    monkeypatch.setattr(FakeRunner, "sleep", hang)
    worker = make_worker()
    heard: list[BaseException] = []

    def wake_up() -> None:
        try:
            worker.wake_up()
        except EngineDeadError as error:
            heard.append(error)

    sleeper = threading.Thread(target=worker.sleep)
    sleeper.start()
    assert entered.wait(20)
    waker = threading.Thread(target=wake_up)
    waker.start()
    with pytest.raises(EngineDeadError, match="hangs"):
        worker.close(timeout_s=0.2)
    waker.join(20)
    assert "hung" in str(heard[0])
    opened.set()
    sleeper.join(20)
    assert not sleeper.is_alive()
