"""Sleep, wake and hot swap: no stream notices, names stay, memory counts as free, and a request says how to wake a model."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, OutOfMemoryError
from engine.records import MemoryLedger
from engine.request import FinishReason
from engine.sampling_params import SamplingParams
from workbench.errors import ModelAsleepError
from workbench.host import EngineHost, HostPhase, ResidentInUseError
from workbench.memory_budget import check_wake

PROMPTS = [[20, 40, 60, 7], [21, 41, 61, 7]]
LONG = SamplingParams(max_tokens=250, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


def tokens(host: EngineHost, model: str | None, params: SamplingParams = SHORT) -> list[tuple[int, ...]]:
    return [host.worker(model).submit(prompt, params).result(120).token_ids for prompt in PROMPTS]


def test_sixteen_streams_across_load_unload_sleep_wake_and_swap_are_their_solo_runs(
    host: EngineHost, versions: Any, other_models: list[Path], eventually: Any
) -> None:
    """Four on the base, on two of its adapters and on another model each; the solo runs come first, one at a time."""
    versions.folders[9] = other_models[0]
    for version in (1, 2, 9):
        host.load(f"t/{version}")
    host.follow("t@champion")
    host.serve("t@champion", 1)
    models = [None, "t@champion", "t/2", "t/9"]
    solo = {model: tokens(host, model, LONG) for model in models}
    assert len({runs[0] for runs in solo.values()}) == 4, "every one must answer differently"
    running = {model: [host.worker(model).submit(prompt, LONG) for prompt in 2 * PROMPTS] for model in models}
    workers = [host.worker(model) for model in models]
    assert eventually(lambda: all(stream.drain() > 0 for streams in running.values() for stream in streams))

    asleep = threading.Thread(target=host.sleep, args=("t/9",))
    asleep.start()
    host.serve("t@champion", 3)
    host.unload("t/2")
    host.load("t/4")
    assert eventually(lambda: host.find("t/9").state.phase is HostPhase.SLEEPING)
    assert workers[0].num_live == 12, "those of the base and its adapters run on"
    assert workers[3].num_live == 4, "and so do those of the model that is about to sleep"
    with pytest.raises(ModelAsleepError, match="Running requests end first"):
        host.worker("t/9")
    later = tokens(host, "t@champion")

    for model, streams in running.items():
        completions = [stream.result(120) for stream in streams]
        assert [c.finish_reason for c in completions] == [FinishReason.LENGTH] * 4
        assert [c.token_ids for c in completions] == 2 * solo[model], model
    assert later == tokens(host, "t/3") != [run[:16] for run in solo["t@champion"]]
    asleep.join(60)
    assert host.find("t/9").state.message == "Asleep at level 1"
    host.wake("t/9")
    assert tokens(host, "t/9", LONG) == solo["t/9"]


@pytest.mark.parametrize("level", [1, 2])
def test_a_base_and_its_adapters_sleep_and_wake_together(host: EngineHost, level: int) -> None:
    host.load("t/1")
    before, awake = [tokens(host, None), tokens(host, "t/1")], host.resident()[0].memory_bytes
    resident = host.sleep("tiny-llama", level)
    assert resident.state.phase is HostPhase.SLEEPING
    assert resident.memory_bytes is not None
    assert awake is not None
    assert resident.memory_bytes < awake
    assert [r.id for r in host.resident()] == ["tiny-llama", "t/1"]
    assert [card.id for card in host.models()] == ["tiny-llama", "t/1"], "clients still see them"
    for model in (None, "t/1"):
        with pytest.raises(ModelAsleepError, match="quire models wake"):
            host.worker(model)
    with pytest.raises(ResidentInUseError, match="Name tiny-llama"):
        host.wake("t/1")
    host.follow("t@champion")
    host.serve("t@champion", 2)
    assert not host.state().ready, "an alias that moves wakes nobody"
    host.load("t/1")
    assert host.state().ready, "but who loads a model wants it awake"
    assert [tokens(host, None), tokens(host, "t/1")] == before
    assert tokens(host, "t@champion") != before[1]
    assert host.resident()[0].memory_bytes == awake


def test_waking_a_model_that_is_about_to_sleep_keeps_it_awake(host: EngineHost, eventually: Any) -> None:
    stream = host.worker().submit(PROMPTS[0], LONG)
    falling = threading.Thread(target=host.sleep, args=("tiny-llama",))
    falling.start()
    assert eventually(lambda: not host.state().ready)
    host.wake("tiny-llama")
    falling.join(30)
    assert not falling.is_alive()
    assert host.state().ready
    assert stream.result(60).finish_reason is FinishReason.LENGTH


def test_a_level_that_is_none_changes_nothing(host: EngineHost) -> None:
    for level in (0, 3, "1", None):
        with pytest.raises(ConfigError, match="no sleep level"):
            host.sleep("tiny-llama", level)  # type: ignore[arg-type]
    assert host.state().ready


def test_what_sleeps_is_room_for_others_and_what_has_no_room_sleeps_on() -> None:
    total = 1 << 50
    awake = MemoryLedger(1 << 20, 1 << 49, 1 << 20, total, "cpu")
    asleep = MemoryLedger(1 << 20, 0, 1 << 20, total, "cpu")
    check_wake("a", asleep, MemoryLedger(1 << 20, 4096, 1 << 20, total, "cpu"), {})
    with pytest.raises(OutOfMemoryError, match="a cannot wake up: it needs 562949953421312 bytes") as caught:
        check_wake("a", asleep, awake, {"b": asleep})
    assert "Resident: b" in str(caught.value)
    assert "put it to sleep" in str(caught.value)


def test_a_budget_counts_a_model_that_sleeps_by_what_it_kept(
    hosted: Any, versions: Any, other_models: list[Path]
) -> None:
    """A further model is refused beside one that is awake, and loads beside it asleep."""

    def one_awake(config: Any, others: Any) -> Any:
        if sum(ledger.kv_bytes for ledger in others.values()):
            raise OutOfMemoryError("one KV cache is all there is room for")
        return replace(config, num_blocks=64)

    versions.folders[9] = other_models[0]
    with hosted(budget=one_awake) as host:
        with pytest.raises(OutOfMemoryError):
            host.load("t/9")
        host.sleep("tiny-llama")
        assert host.load("t/9").state.ready
        assert tokens(host, "t/9")
