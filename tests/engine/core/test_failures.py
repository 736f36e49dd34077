"""What fails, fails alone: steps that raise, memory that runs out, a device that breaks."""

from __future__ import annotations

import pytest

from engine.errors import EngineDeadError, OutOfMemoryError
from engine.fake_runner import expected_tokens
from engine.request import FinishReason

PROMPTS = {"a": list(range(40)), "b": list(range(40, 81)), "c": [8, 7, 6]}


@pytest.mark.parametrize("in_submit", [False, True])
@pytest.mark.parametrize("max_inflight", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError("a kernel raised"), OutOfMemoryError("no memory left")])
def test_a_failed_step_ends_its_requests_and_no_others(
    make_rig, error, max_inflight: int, in_submit: bool
) -> None:
    rig = make_rig(runner={"max_inflight": max_inflight}, max_num_seqs=2)
    for name, prompt in PROMPTS.items():
        rig.add(name, prompt, max_tokens=12)
    for _ in range(6):
        rig.step()
    rig.runner.fail_next(error, in_submit=in_submit)
    rig.run()
    failed = next(step for step in rig.steps if step.error)
    assert type(error).__name__ in failed.error
    assert str(error) in failed.error
    for name, prompt in PROMPTS.items():
        last = rig.last(name)
        if name in dict(failed.rows):
            assert (last.finish_reason, last.error) == (FinishReason.ERROR, failed.error)
            assert rig.requests[name].error == failed.error
            assert rig.tokens(name) == expected_tokens(prompt, 12, 256)[: len(rig.tokens(name))]
        else:
            assert last.finish_reason is FinishReason.LENGTH
            assert rig.tokens(name) == expected_tokens(prompt, 12, 256)
    assert {name for name in PROMPTS if rig.last(name).error} == {"a", "b"}
    stats = rig.engine.stats()
    assert (stats.step_errors, stats.finished) == (1, {"error": 2, "length": 1})
    assert stats.num_free_blocks == stats.num_blocks


def test_requests_in_flight_behind_the_failed_step_are_recomputed(make_rig) -> None:
    rig = make_rig(max_batched_tokens=8)
    rig.add("a", [1, 2, 3], max_tokens=6)
    rig.runner.fail_next(RuntimeError("first step"))
    rig.step()
    rig.add("late", [4, 5, 6], max_tokens=6)  # is planned together with a's second step
    rig.run()
    assert rig.last("a").finish_reason is FinishReason.ERROR
    assert rig.tokens("a") == []
    assert rig.tokens("late") == expected_tokens([4, 5, 6], 6, 256)
    assert rig.requests["late"].num_preemptions == 0


def test_an_engine_survives_failure_after_failure(make_rig) -> None:
    rig = make_rig()
    for i in range(20):
        rig.add(f"bad{i}", [i, i, i], max_tokens=5)
        rig.runner.fail_next(RuntimeError(f"failure {i}"), in_submit=i % 2 == 0)
        rig.run()
        rig.add(f"good{i}", [i, i, i], max_tokens=5)
        rig.run()
        assert rig.last(f"bad{i}").error
        assert rig.tokens(f"good{i}") == expected_tokens([i, i, i], 5, 256)
    assert rig.engine.stats().step_errors == 20


def test_an_aborted_request_is_not_failed_again_by_its_step(make_rig) -> None:
    rig = make_rig()
    rig.add("a", [1, 2, 3], max_tokens=6)
    rig.runner.fail_next(RuntimeError("too late to matter"))
    rig.step()
    rig.engine.abort("a")
    rig.run()
    assert [delta.finish_reason for delta in rig.deltas["a"]] == [FinishReason.ABORT]


def test_a_failed_step_can_be_chosen_by_its_number(make_rig) -> None:
    rig = make_rig(runner={"fail_at": {3: RuntimeError("step three")}})
    rig.add("a", [1, 2, 3], max_tokens=9)
    rig.run()
    assert [step.step_id for step in rig.steps if step.error] == [3]
    assert rig.tokens("a") == expected_tokens([1, 2, 3], 3, 256)


@pytest.mark.parametrize("in_submit", [False, True])
def test_a_broken_device_takes_the_engine(make_rig, in_submit: bool) -> None:
    rig = make_rig()
    rig.add("a", [1, 2, 3], max_tokens=9)
    rig.runner.fail_next(EngineDeadError("the device context is broken"), in_submit=in_submit)
    with pytest.raises(EngineDeadError, match="context is broken"):
        rig.run()
    with pytest.raises(EngineDeadError, match="takes no requests any more"):
        rig.add("b", [1], max_tokens=1)
    with pytest.raises(EngineDeadError):
        rig.engine.step()
    rig.engine.close()
    assert rig.runner.closed


def test_a_device_that_cannot_reset_takes_the_engine(make_rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig()
    rig.add("a", [1, 2, 3], max_tokens=9)
    rig.runner.fail_next(RuntimeError("a kernel raised"))

    def refuse() -> None:
        raise RuntimeError("still broken")

    monkeypatch.setattr(rig.runner, "reset_rows", refuse)
    with pytest.raises(EngineDeadError, match="did not recover"):
        rig.run()
