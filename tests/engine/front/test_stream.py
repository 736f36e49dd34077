"""Every reader gets everything, in its own way of waiting, and none of them holds the engine up."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from engine import Completion, EngineWorker, FinishReason, RequestStream, SamplingParams
from engine.fake_runner import expected_tokens, scripted
from engine.records import Cohort, TokenBatch
from engine.request import Request
from engine.stream import StreamHub
from engine.wakeups import LoopMailbox

ANSWER = "naïve 🙂 and 👩‍👩‍👧: done"
LONG = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=900, temperature=0, ignore_eos=True)
MakeWorker = Callable[..., EngineWorker]


def eventually(holds: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def reason_of(worker: EngineWorker, stream: RequestStream) -> FinishReason | None:
    return next(
        (r.finish_reason for r in worker.records.requests() if r.request_id == stream.request_id), None
    )


async def collected(stream: RequestStream) -> list[str | None]:
    return [delta.text async for delta in stream]


def check_figures(completion: Completion) -> None:
    assert completion.ttft_ms is not None
    assert completion.tpot_ms is not None
    assert 0 < completion.ttft_ms <= completion.e2e_ms
    span = completion.ttft_ms + completion.tpot_ms * (completion.num_output_tokens - 1)
    assert span == pytest.approx(completion.e2e_ms)


def test_a_thread_reads_whole_characters_as_they_come(make_worker: MakeWorker) -> None:
    stream = make_worker(choose=scripted(ANSWER)).submit("hello", SamplingParams(max_tokens=99))
    deltas = list(stream)
    assert "".join(delta.text or "" for delta in deltas) == ANSWER
    assert all(delta.text is not None and "\ufffd" not in delta.text for delta in deltas)
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [FinishReason.STOP]
    assert [delta.created_ns for delta in deltas] == sorted(delta.created_ns for delta in deltas)
    completion = stream.completion
    assert completion is not None
    assert completion.text == ANSWER
    assert completion.token_ids == (*ANSWER.encode(), 256)
    assert completion.prompt_token_ids == tuple(b"hello") == stream.prompt_token_ids
    assert completion.seed == stream.seed
    check_figures(completion)
    assert list(stream) == []  # it is over
    assert stream.result() is completion


def test_a_task_reads_the_same(make_worker: MakeWorker) -> None:
    worker = make_worker(choose=scripted(ANSWER))

    async def main() -> None:
        stream = worker.submit("hello", SamplingParams(max_tokens=99))
        pieces = await collected(stream)
        assert "".join(piece or "" for piece in pieces) == ANSWER
        assert stream.completion is not None
        assert stream.completion.text == ANSWER
        assert (await worker.submit("hello", SamplingParams(max_tokens=99)).aresult()).text == ANSWER
        assert await collected(stream) == []

    asyncio.run(main())


def test_a_result_is_the_same_as_iterating(make_worker: MakeWorker) -> None:
    worker = make_worker()
    params = SamplingParams(max_tokens=40, logprobs=2, ignore_eos=True)
    read, waited, mixed = (worker.submit([5, 6, 7], params) for _ in range(3))
    list(read)
    whole = waited.result()
    for _ in range(200):
        mixed.drain()
    assert mixed.result().token_ids == whole.token_ids == tuple(expected_tokens([5, 6, 7], 40, 256))
    assert read.completion is not None
    assert read.completion.text == whole.text == mixed.result().text
    assert read.completion.logprobs == whole.logprobs == mixed.result().logprobs
    assert [entry.token_id for entry in whole.logprobs] == list(whole.token_ids)


@pytest.mark.parametrize("include", [False, True])
def test_the_text_of_what_stopped_a_request_shows_only_when_asked_for(
    make_worker: MakeWorker, include: bool
) -> None:
    worker = make_worker(choose=scripted("one two three"))

    def text_of(**params: Any) -> tuple[str, Any]:
        asked = SamplingParams(max_tokens=50, include_stop_str_in_output=include, **params)
        stream = worker.submit("x", asked)
        pieces = "".join(delta.text or "" for delta in stream)
        completion = worker.submit("x", asked).result()
        assert completion.text == pieces
        return pieces, completion.stop_reason

    assert text_of(stop="tw") == ("one tw" if include else "one ", "tw")
    assert text_of(stop_token_ids=(ord("w"),)) == ("one tw" if include else "one t", ord("w"))
    assert text_of(skip_special_tokens=False) == ("one two three" + "<|end|>" * include, None)


def test_nothing_reaches_a_stream_behind_its_end() -> None:
    hub = StreamHub()
    stream = RequestStream(Request("a", (1,), LONG), hub, None, lambda _request_id: None)
    hub.add(stream)
    cohort = Cohort(("a",), (0,))
    hub.publish([], TokenBatch(cohort, [5], 1))
    hub.end_all(FinishReason.ERROR, "closed while a step hung")
    hub.publish([], TokenBatch(cohort, [6], 2))
    assert stream.result(timeout_s=0).token_ids == (5,)


def test_waiting_has_a_limit_and_goes_on_afterwards(make_worker: MakeWorker) -> None:
    stream = make_worker(delay_s=0.01).submit([1], LONG)
    with pytest.raises(TimeoutError, match=stream.request_id):
        stream.result(timeout_s=0.05)
    assert not stream.wait(0.0)
    assert stream.result(timeout_s=60).num_output_tokens == 64


@pytest.mark.parametrize("how", ["break", "cancel", "close", "error", "aresult"])
def test_leaving_an_async_reading_early_aborts_the_request(make_worker: MakeWorker, how: str) -> None:
    worker = make_worker(delay_s=0.002)

    async def leave(stream: RequestStream) -> None:
        if how == "break":
            async for _ in stream:
                break
        elif how == "close":
            iterator = stream.__aiter__()
            await anext(iterator)
            await iterator.aclose()
        elif how == "error":
            with pytest.raises(ZeroDivisionError):
                async for _ in stream:
                    1 / 0  # noqa: B018
        else:
            task = asyncio.create_task(collected(stream) if how == "cancel" else stream.aresult())  # type: ignore[arg-type]
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        # Nobody reads on; the engine hears of it all the same.
        while reason_of(worker, stream) is None:
            await asyncio.sleep(0.005)

    stream = worker.submit([1], ENDLESS)
    asyncio.run(asyncio.wait_for(leave(stream), 20))
    assert reason_of(worker, stream) is FinishReason.ABORT
    assert eventually(lambda: worker.stats().num_running == 0)
    assert stream.result(timeout_s=5).finish_reason is FinishReason.ABORT


def test_leaving_a_loop_early_aborts_the_request(make_worker: MakeWorker) -> None:
    worker = make_worker(delay_s=0.002)
    stream = worker.submit([1], ENDLESS)
    for delta in stream:
        assert delta.token_ids
        break
    assert stream.result(timeout_s=20).finish_reason is FinishReason.ABORT


def test_a_reader_whose_event_loop_is_gone_is_given_up(make_worker: MakeWorker) -> None:
    worker = make_worker(delay_s=0.002)
    stream, other = worker.submit([1], ENDLESS), worker.submit([2], LONG)
    loop = asyncio.new_event_loop()
    iterator = stream.__aiter__()
    loop.run_until_complete(anext(iterator))
    waiting = loop.create_task(anext(iterator))  # type: ignore[arg-type]
    loop.run_until_complete(asyncio.sleep(0))
    loop.call_soon(loop.stop)
    loop.run_forever()
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    assert eventually(lambda: reason_of(worker, stream) is FinishReason.ABORT)
    assert other.result(20).finish_reason is FinishReason.LENGTH


def test_one_wake_up_for_all_readers_of_a_loop_and_step(make_worker: MakeWorker) -> None:
    worker = make_worker(delay_s=0.002)
    rung: Counter[int] = Counter()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        plain = loop.call_soon_threadsafe

        def counted(callback: Callable[..., object], *args: Any, **more: Any) -> asyncio.Handle:
            if isinstance(getattr(callback, "__self__", None), LoopMailbox):
                # On the engine thread, before the step is recorded: the count tells steps apart.
                rung[len(worker.records.steps())] += 1
            return plain(callback, *args, **more)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        streams = worker.submit_all([[i + 1] for i in range(64)], [LONG] * 64)
        pieces = await asyncio.gather(*(collected(stream) for stream in streams))
        assert [len(texts) for texts in pieces] == [64] * 64

    asyncio.run(main())
    assert len(rung) > 32, "readers were hardly ever woken: nothing was measured"
    assert set(rung.values()) == {1}


def test_two_event_loops_and_threads_read_at_once(make_worker: MakeWorker) -> None:
    worker = make_worker()
    prompts = [[i + 1, 7] for i in range(48)]
    streams = worker.submit_all(prompts, [LONG] * 48)
    errors: list[BaseException] = []

    def read(mine: list[RequestStream], how: str) -> None:
        async def gather() -> None:
            await asyncio.gather(*(collected(stream) for stream in mine))

        try:
            if how == "loop":
                asyncio.run(gather())
            else:
                for stream in mine:
                    list(stream)
        except BaseException as error:  # noqa: BLE001 - reported by the test
            errors.append(error)

    shares = [(how, streams[i::4]) for i, how in enumerate(["loop", "loop", "thread", "thread"])]
    threads = [threading.Thread(target=read, args=(share, how)) for how, share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for prompt, stream in zip(prompts, streams, strict=True):
        assert stream.completion is not None
        assert stream.completion.token_ids == tuple(expected_tokens(prompt, 64, 256))


def test_a_slow_reader_delays_nobody(make_worker: MakeWorker) -> None:
    worker = make_worker()
    slow, quick = worker.submit([1], LONG), worker.submit([2], LONG)
    iterator = iter(slow)
    next(iterator)
    next(iterator)
    assert quick.result(20).num_output_tokens == 64
    # It ended, two tokens into its reading.
    assert eventually(lambda: reason_of(worker, slow) is FinishReason.LENGTH)
    assert slow.completion is None
    assert len(list(iterator)) == 62


def test_hundreds_of_threads_wake_one_another(make_worker: MakeWorker) -> None:
    """Readers that wait with and without limits, and readers that leave, in any order: none may miss its end."""
    worker = make_worker(delay_s=0.0005)
    draw = random.Random(3)
    streams = worker.submit_all([[i % 200 + 1] for i in range(150)], [LONG] * 150)
    done: list[int] = []

    def read(index: int, stream: RequestStream, kind: int) -> None:
        if kind == 0:
            assert len(list(stream)) == 64
        elif kind == 1:
            while not stream.wait(draw.random() * 0.004):
                pass
            assert stream.result().num_output_tokens == 64
        elif kind == 2:
            for count, _ in enumerate(stream):
                if count == 5:
                    break
        else:
            assert stream.result(60).num_output_tokens == 64
        done.append(index)

    threads = [
        threading.Thread(target=read, args=(i, stream, i % 4), daemon=True)
        for i, stream in enumerate(streams)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert sorted(done) == list(range(150))
