"""An engine that sleeps gives its memory back, takes no requests, and answers as before when it wakes up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import (
    ConfigError,
    EngineAsleepError,
    EngineBusyError,
    EngineDeadError,
    OutOfMemoryError,
)
from engine.fake_runner import FakeRunner, expected_tokens
from engine.record_log import RecordLog
from engine.records import MemoryLedger
from engine.sampling_params import SamplingParams

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6] * 8
SETTINGS = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}


def run_prompt(rig: Any, name: str) -> tuple[list[int], int]:
    """The tokens that answer PROMPT, and how many of its tokens came from the prefix cache."""
    rig.add(name, PROMPT, **SETTINGS)
    rig.run()
    return rig.tokens(name), rig.requests[name].num_cached_tokens


@pytest.mark.parametrize("level", [1, 2])
def test_answers_after_waking_equal_those_before_and_nothing_is_read_from_the_old_cache(
    make_rig: Callable[..., Any], level: int
) -> None:
    rig = make_rig()
    expected = expected_tokens(PROMPT, 20, rig.runner.vocab_size)
    assert run_prompt(rig, "before") == (expected, 0)
    assert run_prompt(rig, "cached")[1] > 0
    rig.engine.sleep(level)
    assert rig.runner.sleep_level == level
    assert rig.engine.stats().num_cached_blocks == 0
    rig.engine.check_integrity()
    rig.engine.wake_up()
    assert rig.runner.sleep_level == 0
    assert run_prompt(rig, "after") == (expected, 0)
    assert run_prompt(rig, "cached again") == (expected, run_prompt(rig, "cached once more")[1])


def test_what_the_host_tier_held_is_gone_too(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(
        num_blocks=8, max_model_len=128, swap_space_bytes=64 * 1024, runner={"num_host_blocks": 64}
    )
    run_prompt(rig, "before")
    rig.add("other", [7] * 100, **SETTINGS)  # takes the blocks of the first, which go to the tier
    rig.run()
    assert rig.engine.stats().num_cached_host_blocks > 0
    rig.engine.sleep()
    assert rig.engine.stats().num_cached_host_blocks == 0
    rig.engine.check_integrity()
    rig.engine.wake_up()
    assert run_prompt(rig, "after") == (expected_tokens(PROMPT, 20, rig.runner.vocab_size), 0)


def test_asleep_it_takes_no_requests_and_says_so(make_rig: Callable[..., Any]) -> None:
    rig = make_rig()
    request = rig.engine.make_request(PROMPT, SamplingParams(), request_id="made before")
    rig.engine.sleep()
    assert rig.engine.is_sleeping
    assert rig.engine.stats().is_sleeping
    with pytest.raises(EngineAsleepError, match=r"wake_up\(\)"):
        rig.engine.add(request)
    with pytest.raises(EngineAsleepError):
        rig.engine.make_request(PROMPT, SamplingParams())
    assert not rig.engine.has_work
    rig.engine.wake_up()
    assert not rig.engine.stats().is_sleeping
    rig.engine.add(request)
    rig.run()


def test_it_does_not_sleep_while_requests_live(make_rig: Callable[..., Any]) -> None:
    rig = make_rig()
    rig.add("a", PROMPT, **SETTINGS)
    for _ in range(3):
        with pytest.raises(EngineBusyError, match="1 requests"):
            rig.engine.sleep()
        rig.step()
    rig.engine.abort("a")
    with pytest.raises(EngineBusyError):  # its last delta is not handed out yet
        rig.engine.sleep()
    rig.run()
    rig.engine.sleep()
    assert rig.engine.is_sleeping


def test_other_levels_are_refused_and_a_second_call_does_nothing(make_rig: Callable[..., Any]) -> None:
    rig = make_rig()
    rig.engine.wake_up()
    with pytest.raises(ConfigError, match="level 3"):
        rig.engine.sleep(3)
    rig.engine.sleep(1)
    rig.engine.sleep(2)
    assert rig.runner.sleep_level == 1, "it was asleep already"
    rig.engine.close()
    for call in (rig.engine.sleep, rig.engine.wake_up):
        with pytest.raises(EngineDeadError):
            call()


@pytest.mark.parametrize(
    ("error", "dies"), [(OutOfMemoryError("taken meanwhile"), False), (EngineDeadError("broken"), True)]
)
def test_what_waking_raises_leaves_it_asleep_or_dead(
    make_rig: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception, dies: bool
) -> None:
    rig = make_rig()
    rig.engine.sleep()

    def fail(self: FakeRunner) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(FakeRunner, "wake_up", fail)
        with pytest.raises(type(error)):
            rig.engine.wake_up()
    if dies:
        with pytest.raises(EngineDeadError):
            rig.engine.wake_up()
    else:
        with pytest.raises(EngineAsleepError):
            rig.add("early", PROMPT)
        rig.engine.wake_up()
        assert run_prompt(rig, "later")[0] == expected_tokens(PROMPT, 20, rig.runner.vocab_size)


def test_whoever_follows_the_blocks_sees_the_cache_emptied(make_rig: Callable[..., Any]) -> None:
    rig = make_rig()
    run_prompt(rig, "before")
    rig.engine.sleep()
    rig.engine.wake_up()
    rig.add("after", [7] * 5, max_tokens=1)
    rig.run()
    log = RecordLog(600.0, rig.engine.stats().num_blocks)
    for record in rig.steps:
        log.on_step(record)
    blocks = log.block_map()
    assert blocks is not None
    assert not blocks.published
    assert not blocks.owners


@pytest.mark.parametrize(("level", "device", "weights"), [(1, "cpu", 1000), (2, "cpu", 0), (1, "cuda:0", 0)])
def test_the_ledger_counts_what_stays_on_the_device(
    make_rig: Callable[..., Any], level: int, device: str, weights: int
) -> None:
    rig = make_rig(device=device)
    rig.engine._memory = MemoryLedger(
        weights_bytes=1000, kv_bytes=500, workspace_bytes=40, total_bytes=4000, device=device, graphs_bytes=7,
        host_tier_bytes=300,
    )  # fmt: skip
    awake = rig.engine.stats().memory
    rig.engine.sleep(level)
    asleep = rig.engine.stats().memory
    assert (asleep.weights_bytes, asleep.kv_bytes, asleep.graphs_bytes) == (weights, 0, 0)
    assert asleep.host_tier_bytes == 0
    assert asleep.workspace_bytes == 40
    rig.engine.wake_up()
    assert rig.engine.stats().memory == awake
