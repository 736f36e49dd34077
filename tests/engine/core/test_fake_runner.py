"""FakeRunner punishes wrong plans as a device would; FakeTokenizer is a tokenizer."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from engine.fake_runner import (
    FakeRunner,
    FakeTokenizer,
    PlanViolation,
    expected_tokens,
    next_state,
    next_token,
)
from engine.plan import BlockCopies, RowAdmission, StepPlan
from engine.sampling_params import SamplingParams


def admission(row: int, tokens: list[int], blocks: list[int], num_computed: int = 0) -> RowAdmission:
    return RowAdmission(
        row, f"r{row}", tokens, len(tokens), num_computed, (tuple(blocks),), SamplingParams(), 0
    )


def plan(
    step_id: int, rows: list[tuple[int, int, int]], admitted=(), finished=(), new=(), samples=None
) -> StepPlan:
    """`rows`: (row, start, num_tokens); `new`: blocks appended to each row."""
    blocks = [list(b) for b in new] or [[] for _ in rows]
    ends = np.cumsum([0, *(len(b) for b in blocks)]).astype(np.int32)
    columns = [np.array(column, np.int32) for column in zip(*rows, strict=True)]
    logit_rows = np.arange(len(rows), dtype=np.int32) if samples is None else np.array(samples, np.int32)
    ids = np.array([b for row in blocks for b in row], np.int32)
    return StepPlan(
        step_id,
        *columns,
        np.zeros(len(rows), np.int32),
        logit_rows,
        (ends,),
        (ids,),
        tuple(admitted),
        tuple(finished),
    )


@pytest.fixture
def runner() -> FakeRunner:
    """With one row of six tokens in blocks 0 and 1, computed."""
    fake = FakeRunner(8, 4, max_inflight=4)
    fake.submit(plan(0, [(0, 0, 6)], [admission(0, [1, 2, 3, 4, 5, 6], [0, 1])]))
    fake.collect()
    return fake


def test_tokens_can_be_worked_out_by_hand(runner: FakeRunner) -> None:
    state = 0
    for token in (1, 2, 3, 4, 5, 6):
        state = 3 * state + token + 1
    first = (state + 7 * 5) % 256
    second = (3 * state + first + 1 + 7 * 6) % 256
    assert next_token(next_state(0, 1), 0, 256) == 2
    assert expected_tokens([1, 2, 3, 4, 5, 6], 2, 256) == [first, second]
    runner.submit(plan(1, [(0, 6, 1)]))
    assert runner.collect().token_ids == [second]


def test_results_come_in_order_and_not_before_the_device_is_done() -> None:
    fake = FakeRunner(8, 4, delay_s=0.02)
    began = time.monotonic()
    fake.submit(plan(0, [(0, 0, 2)], [admission(0, [1, 2], [0])]))
    fake.submit(plan(1, [(0, 2, 1)]))
    assert time.monotonic() - began < 0.02, "submitting must not wait"
    assert [fake.collect().step_id, fake.collect().step_id] == [0, 1]
    assert time.monotonic() - began >= 0.04


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (plan(1, [(0, 8, 1)]), "has no token yet|behind its 2 blocks"),
        (plan(1, [(0, 7, 1)]), "has no token yet"),
        (plan(1, [(5, 0, 1)]), "never admitted"),
        (plan(1, [(0, 6, 1)], [admission(0, [1], [2])]), "admitted twice"),
        (plan(1, [(0, 6, 1)], finished=[3]), "never admitted"),
        (plan(1, [(0, 6, 1)], new=[[8]]), "outside of the cache"),
        (plan(1, [(0, 6, 1), (0, 6, 1)]), "twice in one step"),
        (plan(1, [(1, 0, 2), (0, 6, 1)], [admission(1, [1, 2], [2])]), "do not come first"),
        (plan(1, [(1, 0, 2)], [admission(1, [7, 7], [1])]), "which others use"),
        (plan(1, [(1, 4, 1)], [admission(1, [1, 2, 3, 9, 5], [0, 2], 4)]), "not its own past"),
        (plan(1, [(1, 4, 1)], [admission(1, [1, 2, 3, 4, 5], [3, 2], 4)]), "not its own past"),
        (plan(1, [(1, 0, 1)], [admission(1, [1, 2], [2])]), "samples at 1 of 2"),
    ],
)
def test_a_wrong_plan_is_named(runner: FakeRunner, wrong: StepPlan, complaint: str) -> None:
    with pytest.raises(PlanViolation, match=complaint):
        runner.submit(wrong)
    assert runner.violations


def test_a_shared_block_may_be_read(runner: FakeRunner) -> None:
    runner.submit(plan(1, [(1, 4, 1)], [admission(1, [1, 2, 3, 4, 9], [0, 2], 4)]))
    assert runner.collect().token_ids == expected_tokens([1, 2, 3, 4, 9], 1, 256)


PAST = [1, 2, 3, 4, 5, 6]


def with_copies(step: StepPlan, out: list[tuple[int, int]], back: list[tuple[int, int]]) -> StepPlan:
    """`out`: (block, slot); `back`: (slot, block)."""
    return replace(
        step, copies=BlockCopies(*(np.array(pairs, np.int32).reshape(-1, 2) for pairs in (out, back)))
    )


@pytest.fixture
def tiered() -> FakeRunner:
    """Row 0's block 0 was saved to slot 1 when row 1 came, whose own first block went to slot 2. Both rows have ended."""
    fake = FakeRunner(8, 4, num_host_blocks=4, max_inflight=4)
    fake.submit(plan(0, [(0, 0, 6)], [admission(0, PAST, [0, 1])]))
    fake.submit(with_copies(plan(1, [(1, 0, 5)], [admission(1, [9, 9, 9, 9, 9], [2, 3])], [0]), [(0, 1)], []))
    fake.submit(with_copies(plan(2, [(2, 0, 1)], [admission(2, [1], [0])], [1]), [(2, 2)], []))
    for _ in range(3):
        fake.collect()
    return fake


def returning(out: list[tuple[int, int]], back: list[tuple[int, int]], blocks: list[int]) -> StepPlan:
    """Row 0's text again, its first four tokens in the first of `blocks`."""
    return with_copies(plan(3, [(0, 4, 2)], [admission(0, PAST, blocks, 4)]), out, back)


def test_a_block_that_was_saved_serves_again_elsewhere(tiered: FakeRunner) -> None:
    tiered.submit(returning([], [(1, 5)], [5, 6]))
    assert tiered.collect().token_ids == expected_tokens(PAST, 1, 256)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (returning([], [(2, 5)], [5, 6]), "not its own past"),  # another's slot
        (
            returning([(2, 1)], [(1, 5)], [5, 6]),
            "not its own past",
        ),  # given on in this step, before it is read
        (returning([], [(1, 4)], [5, 6]), "not its own past"),  # into another block
        (returning([], [(3, 5)], [5, 6]), "hold nothing"),
        (returning([], [(1, 0)], [5, 6]), "which rows use"),
        (returning([(0, 3)], [(1, 5)], [5, 6]), "which rows use"),
        (returning([(7, 3)], [(1, 5)], [5, 6]), "not full"),
        (returning([(2, 3), (1, 3)], [(1, 5)], [5, 6]), "twice"),
        (returning([], [(1, 5), (2, 5)], [5, 6]), "twice"),
        (returning([], [(4, 5)], [5, 6]), "outside"),
        (returning([(8, 3)], [(1, 5)], [5, 6]), "outside"),
    ],
)
def test_a_wrong_copy_is_named(tiered: FakeRunner, wrong: StepPlan, complaint: str) -> None:
    with pytest.raises(PlanViolation, match=complaint):
        tiered.submit(wrong)


def test_a_slot_is_not_written_while_a_step_in_flight_reads_it(tiered: FakeRunner) -> None:
    tiered.submit(returning([], [(1, 5)], [5, 6]))
    overwriting = with_copies(plan(4, [(2, 1, 1)]), [(2, 1)], [])
    with pytest.raises(PlanViolation, match="are written"):
        tiered.submit(overwriting)
    tiered.collect()
    tiered.submit(overwriting)


def test_a_step_that_fails_leaves_garbage_and_spoils_what_follows(runner: FakeRunner) -> None:
    runner.fail_next(RuntimeError("boom"))
    runner.submit(plan(1, [(0, 6, 1)]))
    runner.submit(plan(2, [(0, 7, 1)]))
    for complaint in ("boom", "before this one"):
        with pytest.raises(RuntimeError, match=complaint):
            runner.collect()
    runner.reset_rows()
    with pytest.raises(PlanViolation, match="not its own past"):
        runner.submit(plan(3, [(0, 7, 1)], [admission(0, [1, 2, 3, 4, 5, 6, 7, 8], [0, 1], 7)]))


def test_more_steps_than_may_be_in_flight_are_refused(runner: FakeRunner) -> None:
    for i in range(4):
        runner.submit(
            replace(
                plan(i + 1, [(0, 6 + i, 1)]),
                new_block_offsets=(np.array([0, 1], np.int32),),
                new_block_ids=(np.array([2 + i], np.int32),),
            )
        )
    with pytest.raises(AssertionError, match="more than 4"):
        runner.submit(plan(9, [(0, 10, 1)]))


@pytest.mark.parametrize(
    "text", ["", "plain", "größer 🙂", "<|user|>hi<|end|>", "<|user", "a<|end|><|end|>b"]
)
def test_the_fake_tokenizer_decodes_what_it_encodes(text: str) -> None:
    tokenizer = FakeTokenizer()
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_the_fake_tokenizer_never_shows_half_a_character() -> None:
    detokenizer = FakeTokenizer().detokenizer()
    pieces = [detokenizer.push([byte]) for byte in "aü🙂".encode()]
    assert pieces == ["a", "", "ü", "", "", "", "🙂"]
    assert detokenizer.push("🙂".encode()[:2]) + detokenizer.flush() == "\ufffd"


def test_the_fake_chat_template_marks_roles_and_asks_for_an_answer() -> None:
    tokenizer = FakeTokenizer()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>hi<|end|><|assistant|>"
