"""Which adapters share a batch: never more than there are slots, and everybody's turn comes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.block_pool import BlockPool
from engine.cache.sequence_blocks import SequenceBlocks
from engine.lora import Lora
from engine.plan import StepPlan, StepResult
from engine.request import Request, Sequence, SequenceStatus
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler


class World:
    """A scheduler whose steps choose token 1; which adapter each slot holds, as a runner would know it."""

    def __init__(self, max_loras: int, *, num_blocks: int = 64, budget: int = 64, rows: int = 8) -> None:
        blocks = SequenceBlocks(BlockPool(num_blocks), 4, version_digest="v", enable_prefix_cache=True)
        self.scheduler = Scheduler(
            blocks,
            max_batched_tokens=budget,
            max_num_seqs=rows,
            eos_token_ids=frozenset(),
            max_loras=max_loras,
        )
        self.slots: dict[int, int] = {}
        self.rows: dict[int, tuple[int, int]] = {}  # slot and adapter by row
        self.count = 0

    def add(self, lora_id: int, num_prompt: int = 3, max_tokens: int = 4) -> Sequence:
        """`lora_id` 0: the base alone."""
        self.count += 1
        lora = Lora(f"l{lora_id}", f"digest {lora_id}", lora_id, 8, 0) if lora_id else None
        prompt = [self.count % 50 + 2, *[2] * (num_prompt - 1)]
        request = Request(f"r{self.count}", tuple(prompt), SamplingParams(max_tokens=max_tokens), lora=lora)
        seq = Sequence(request, list(prompt), num_prompt, num_prompt + max_tokens)
        self.scheduler.add(seq)
        return seq

    def step(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        self.scheduler.check_integrity()
        if plan is None:
            return None
        for admission in plan.admitted:
            if admission.lora_slot >= 0:
                self.slots[admission.lora_slot] = admission.lora_id
            self.rows[admission.row] = (admission.lora_slot, admission.lora_id)
        for row in plan.rows.tolist():
            slot, lora_id = self.rows[row]
            assert (slot < 0) == (lora_id == 0)
            assert slot < 0 or self.slots[slot] == lora_id, f"slot {slot} was taken from a running adapter"
        self.scheduler.commit(StepResult(plan.step_id, [1] * len(plan.logit_rows)))
        self.scheduler.check_integrity()
        return plan

    @property
    def running(self) -> set[int]:
        return {seq.request.lora.lora_id for seq in self.scheduler.running if seq.request.lora is not None}


ARRIVALS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20), st.integers(1, 6)), max_size=24)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(ARRIVALS, max_size=6), st.sampled_from([8, 64]), st.data())
def test_slots_are_never_overcommitted_and_every_request_ends(
    max_loras: int, arrivals: list[list[tuple[int, int, int]]], num_blocks: int, data: st.DataObject
) -> None:
    world = World(max_loras, num_blocks=num_blocks, budget=16, rows=4)
    for group in arrivals:
        added = [world.add(*each) for each in group]
        world.step()
        if added and data.draw(st.booleans()):
            world.scheduler.abort(added[0].request_id)
            world.scheduler.check_integrity()
    for _ in range(3000):
        if not world.scheduler.has_work:
            break
        world.step()
    assert not world.scheduler.has_work
    world.scheduler.loras.check_integrity(Counter(), Counter())


def test_an_adapter_without_a_slot_gets_one_however_many_requests_of_others_come() -> None:
    world = World(2)
    for max_tokens in (
        2,
        4,
        6,
    ):  # they end one after another: both adapters have somebody running at any time
        world.add(1, max_tokens=max_tokens), world.add(2, max_tokens=max_tokens)
    world.step()
    late = [world.add(3, max_tokens=2), world.add(4, max_tokens=2), world.add(3, max_tokens=2)]
    base = world.add(0)
    passed = 0
    for _ in range(60):
        world.add(1), world.add(2)  # as fast as they are served
        world.step()
        passed += base.status is not SequenceStatus.WAITING and late[0].status is SequenceStatus.WAITING
        if all(seq.status is SequenceStatus.FINISHED for seq in late):
            break
    assert [seq.status for seq in late] == [SequenceStatus.FINISHED] * 3
    assert passed, "the base needs no slot and does not wait for one"


def test_only_as_many_adapters_give_way_as_others_wait() -> None:
    world = World(3)
    for lora_id in (1, 2, 3):
        world.add(lora_id, max_tokens=30)
    world.step()
    waiting = world.add(4)
    held, others = world.add(1), [world.add(2), world.add(3)]
    world.step()
    assert [seq.status for seq in (waiting, held)] == [SequenceStatus.WAITING] * 2  # 1 has run longest
    assert [seq.status for seq in others] == [SequenceStatus.RUNNING] * 2


def test_an_adapter_that_comes_back_finds_its_slot_and_the_least_recently_used_is_taken() -> None:
    world = World(2)
    slots: dict[int, int] = {}
    for lora_id in (1, 2, 1):
        world.add(lora_id, max_tokens=1)
        plan = world.step()
        assert plan is not None
        assert slots.setdefault(lora_id, plan.admitted[0].lora_slot) == plan.admitted[0].lora_slot
    world.add(3, max_tokens=1)
    plan = world.step()
    assert plan is not None
    assert plan.admitted[0].lora_slot == slots[2]
