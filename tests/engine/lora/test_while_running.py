"""Adapters come and go on a worker while requests stream, and through the front of notebooks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import (
    LLM,
    EngineDeadError,
    EngineWorker,
    InvalidRequestError,
    SamplingParams,
    UnsupportedAdapterError,
)
from engine.engine import Engine
from engine.plan import StepPlan
from engine.records import EngineEvent, RequestRecord, StepRecord
from engine.request import FinishReason
from engine.stream import RequestStream

ROOT = Path(__file__).parents[3]
PROMPT = [7, 3, 11, 2, 19, 23, 5, 31, 8]
LONG = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)


def tokens(stream: RequestStream) -> list[int]:
    stream.wait(60)
    completion = stream.result()
    assert completion.error is None, completion.error
    return list(completion.token_ids)


def test_adapters_are_loaded_removed_and_replaced_while_requests_stream(
    build: Callable[..., Engine], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    first, second, third = (adapter(tmp_path / str(seed), seed=seed, rank=4 + seed) for seed in (0, 1, 2))
    bad = adapter(tmp_path / "bad", rank=9)
    worker = EngineWorker(build(max_loras=2))
    assert worker.add_lora("kept", first).rank == 4  # also before it is started
    worker.start()
    try:
        steady = [worker.submit(PROMPT, LONG, lora=name) for name in ("kept", None)]
        swapped: list[tuple[Path, RequestStream]] = []
        for turn in range(6):
            folder = (second, third)[turn % 2]
            worker.add_lora("swapped", folder)
            with pytest.raises(InvalidRequestError, match="'swapped' is in use"):
                worker.add_lora("swapped", first)
            with pytest.raises(UnsupportedAdapterError, match="max_lora_rank 8"):
                worker.add_lora("bad", bad)
            swapped.append((folder, worker.submit(PROMPT, LONG, lora="swapped")))
            worker.remove_lora("swapped")  # its request has hardly begun
            with pytest.raises(InvalidRequestError, match="no adapter 'swapped'"):
                worker.submit(PROMPT, LONG, lora="swapped")
        assert [lora.name for lora in worker.loras] == ["kept"]
        got = [tokens(stream) for stream in (*steady, *[stream for _, stream in swapped])]
        worker.add_lora("second", second)
        worker.add_lora("third", third)
        alone = {
            name: tokens(worker.submit(PROMPT, LONG, lora=name, cache_salt=f"alone {name}"))
            for name in ("kept", None, "second", "third")
        }
        names = ["kept", None, *[{second: "second", third: "third"}[folder] for folder, _ in swapped]]
        assert got == [alone[name] for name in names]
        assert len({tuple(each) for each in alone.values()}) == 4
    finally:
        worker.close()
    for refused in (lambda: worker.add_lora("late", first), lambda: worker.remove_lora("kept")):
        with pytest.raises(EngineDeadError):
            refused()


def test_the_shipped_adapters_answer_in_one_engine() -> None:
    """Four ticket extractors on one base: each writes the JSON that the base alone does not."""
    settings: dict[str, Any] = {"num_threads": 1, "num_blocks": 64, "max_model_len": 256, "enable_lora": True}
    with LLM(ROOT / "data/models/chat-base", **settings) as llm:
        for version in ("v1", "v2", "v3", "v4"):
            llm.add_lora(version, ROOT / "data/models/ticket-extractor" / version)
        ticket = [{"role": "user", "content": "My order 123 is late, please send it soon. Anna"}]
        params = SamplingParams(max_tokens=8, temperature=0.0)

        def ask(lora: str | None) -> str:
            return llm.chat(ticket, params, lora=lora, use_tqdm=False)[0].text

        names = [None, "v1", "v2", "v3", "v4"]
        together = [each.text for each in llm.chat([ticket] * 5, params, lora=names, use_tqdm=False)]
        assert [text.startswith('{"customer":') for text in together] == [False, True, True, True, True]
        assert together[1] == ask("v1") == llm.chat(ticket, params, lora=["v1"], use_tqdm=False)[0].text
        with pytest.raises(InvalidRequestError, match="2 adapters were given for 1 prompts"):
            llm.generate("x", params, lora=["v1", None])
        llm.remove_lora("v1")
        with pytest.raises(InvalidRequestError, match="no adapter 'v1'"):
            ask("v1")


@pytest.mark.parametrize("settings", [{}, {"dtype": "float32"}], ids=["by-operation", "compiled"])
def test_adapters_answer_after_a_sleep_that_drops_the_weights_as_before(
    build: Callable[..., Engine], adapter: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    worker = EngineWorker(build(**settings))
    worker.add_lora("a", adapter(tmp_path / "a", seed=0))
    worker.start()
    try:
        before = [tokens(worker.submit(PROMPT, LONG, lora=name)) for name in ("a", None)]
        assert before[0] != before[1]
        worker.sleep(2)
        worker.add_lora("b", adapter(tmp_path / "b", seed=1))
        worker.wake_up()
        assert [tokens(worker.submit(PROMPT, LONG, lora=name)) for name in ("a", None)] == before
        assert tokens(worker.submit(PROMPT, LONG, lora="b")) not in before
    finally:
        worker.close()


class Ended:
    """Which requests a sink heard of: by a record, or by the engine's death."""

    def __init__(self) -> None:
        self.recorded: list[str] = []
        self.lost: dict[str, str | None] = {}

    def on_request(self, record: RequestRecord) -> None:
        self.recorded.append(record.request_id)

    def on_event(self, event: EngineEvent) -> None:
        if event.kind == "dead":
            self.lost = dict(zip(event.request_ids, event.loras, strict=True))

    def on_step(self, record: StepRecord) -> None:
        assert self.hears_steps

    hears_steps = False


def test_a_sink_of_an_adapter_hears_of_its_requests_and_death_names_each_ones_adapter(
    build: Callable[..., Engine], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    engine = build()
    worker = EngineWorker(engine)
    worker.add_lora("a", adapter(tmp_path / "a"))
    own, every = Ended(), Ended()
    every.hears_steps = True
    worker.add_sink(own, lora="a")
    worker.add_sink(every)
    worker.start()
    for name, lora in (("with", "a"), ("without", None)):
        tokens(worker.submit(PROMPT, LONG, lora=lora, request_id=name))

    def lost(plan: StepPlan) -> None:
        raise EngineDeadError("device lost")

    engine._runner.submit = lost  # type: ignore[method-assign]
    streams = worker.submit_all([PROMPT, PROMPT], [LONG, LONG], loras=["a", None])
    assert [stream.result(60).finish_reason for stream in streams] == [FinishReason.ERROR] * 2
    deadline = time.monotonic() + 10
    while not every.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (own.recorded, every.recorded) == (["with"], ["with", "without"])
    assert own.lost == every.lost == {streams[0].request_id: "a", streams[1].request_id: None}
