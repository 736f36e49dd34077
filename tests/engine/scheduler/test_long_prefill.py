"""A giant prompt and those behind it: how many steps they wait for their first token, and that it is read all the same."""

from __future__ import annotations

import pytest

from engine.cache.block_pool import BlockPool
from engine.cache.sequence_blocks import SequenceBlocks
from engine.plan import StepResult
from engine.request import Request, Sequence, SequenceStatus
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler

BUDGET = 32
GIANT = 24 * BUDGET


class Line:
    """A scheduler whose steps are taken in one after another; every token is a 1."""

    def __init__(self, num_blocks: int = 1000, budget: int = BUDGET, *, cache: bool = True) -> None:
        blocks = SequenceBlocks(BlockPool(num_blocks), 4, version_digest="v", enable_prefix_cache=cache)
        self.scheduler = Scheduler(
            blocks, max_batched_tokens=budget, max_num_seqs=64, eos_token_ids=frozenset()
        )
        self.num_steps = 0
        self.num_tokens: list[int] = []  # of each step
        self.first: dict[str, int] = {}  # steps until the first token

    def add(self, name: str, num_tokens: int, max_tokens: int = 1, priority: int = 0) -> Sequence:
        # Nobody shares a prefix with another.
        prompt = [ord(name[0]), len(self.scheduler.sequences()), self.num_steps, *[2] * num_tokens][
            :num_tokens
        ]
        request = Request(
            name, tuple(prompt), SamplingParams(max_tokens=max_tokens), priority=priority, cache_salt=name
        )
        seq = Sequence(request, prompt, num_tokens, num_tokens + max_tokens)
        self.scheduler.add(seq)
        return seq

    def step(self) -> None:
        plan = self.scheduler.plan()
        assert plan is not None
        self.num_tokens.append(int(plan.num_tokens.sum()))
        self.num_steps += 1
        commit = self.scheduler.commit(StepResult(plan.step_id, [1] * len(plan.logit_rows)))
        if self.num_steps % 16 == 0 or len(self.scheduler.running) < 4:
            self.scheduler.check_integrity()
        for seq in commit.sequences:
            self.first.setdefault(seq.request_id, self.num_steps)

    def run(self, max_steps: int = 1000) -> None:
        while self.scheduler.has_work:
            self.step()
            assert self.num_steps < max_steps, "somebody starves"


@pytest.fixture
def behind_a_giant() -> Line:
    line = Line()
    line.add("giant", GIANT)
    line.step()
    return line


def test_short_prompts_do_not_wait_for_a_giant_one(behind_a_giant: Line) -> None:
    line = behind_a_giant
    for i in range(8):
        line.add(f"s{i}", BUDGET // 4)
    line.run()
    # Half of each step is two of them.
    assert [line.first[f"s{i}"] - 1 for i in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert line.first["giant"] == 26  # 8 * 8 tokens later than alone, two steps
    assert set(line.num_tokens) == {BUDGET}, "a step was not full"


def test_one_that_needs_several_steps_is_read_before_the_giant(behind_a_giant: Line) -> None:
    line = behind_a_giant
    line.add("medium", 4 * BUDGET)
    line.add("short", 4)
    line.run()
    assert line.first["medium"] - 1 == 8
    assert line.first["short"] - 1 == 9  # behind the one before it in the queue
    assert line.first["giant"] == 29


def test_who_has_as_much_before_it_as_the_long_one_waits(behind_a_giant: Line) -> None:
    line = behind_a_giant
    line.add("as long", GIANT)
    line.add("short", 4)
    line.run()
    assert line.first["short"] - 1 == 1, "it waits behind one that has to wait"
    assert line.first["giant"] == 25 < line.first["as long"]


def test_a_later_priority_does_not_overtake(behind_a_giant: Line) -> None:
    line = behind_a_giant
    line.add("later", 4, priority=1)
    line.add("sooner", 4, priority=-1)
    line.run()
    assert line.first["sooner"] - 1 == 1
    assert line.first["later"] >= line.first["giant"]


@pytest.mark.parametrize("num_decoding", [1, 3, 5, 6, 7])
def test_a_giant_ends_though_short_ones_never_cease(num_decoding: int) -> None:
    """Half of what the decoding sequences leave is its own; the less they leave, the longer it takes."""
    budget, num_tokens = 8, 120
    line = Line(budget=budget)
    for i in range(num_decoding):
        line.add(f"d{i}", 1, max_tokens=300)
    line.step()
    line.add("giant", num_tokens)
    line.step()
    left = budget - num_decoding
    while "giant" not in line.first:
        if len(line.scheduler.waiting) < 4:
            line.add(f"s{line.num_steps}", 3)
        line.step()
        assert line.num_steps <= 3 + num_tokens / max(1, left // 2), "the giant starves"
    assert any(name.startswith("s") for name in line.first) == (left > 1)


def test_a_giant_keeps_the_blocks_of_its_whole_prompt() -> None:
    line = Line(num_blocks=GIANT // 4 + 4)
    giant = line.add("giant", GIANT)
    line.step()
    for i in range(6):
        line.add(f"s{i}", 8)
    line.run()
    assert line.first["s1"] - 1 == 1
    assert giant.num_preemptions == 0


def test_a_giant_that_lost_its_blocks_is_not_overtaken_again() -> None:
    line = Line(num_blocks=GIANT // 4 + 8, cache=False)
    giant = line.add("giant", GIANT)
    line.step()
    for i in range(2):
        line.add(f"grows{i}", 8, max_tokens=60)
    while not giant.num_preemptions:
        line.step()
        assert line.num_steps < 100
    while giant.status is SequenceStatus.WAITING:
        line.step()
    assert line.scheduler.num_scheduled(giant) < GIANT - 2 * BUDGET
    line.add("short", 4)
    line.run()
    assert line.first["giant"] <= line.first["short"]


def test_the_giant_may_leave_while_another_overtakes_it(behind_a_giant: Line) -> None:
    line = behind_a_giant
    line.add("medium", 4 * BUDGET)
    line.step()
    line.scheduler.abort("giant")
    line.run()
    assert line.num_tokens[2:4] == [BUDGET, BUDGET]
    assert line.first["medium"] - 1 == 1 + 4  # half a step's tokens beside the giant, then whole steps
