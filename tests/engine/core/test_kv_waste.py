"""How much of the held blocks no token uses: as the records tell it, against the scheduler's own counts."""

from __future__ import annotations

from random import Random

import pytest

from engine.kv_waste import KVWaste, kv_waste

BLOCK_SIZE = 16


def slots_now(engine) -> KVWaste:
    """The truth of this moment, from the block tables."""
    scheduler = engine._scheduler
    running = scheduler.running
    empty = sum(len(seq.block_ids) * BLOCK_SIZE - scheduler.num_scheduled(seq) for seq in running)
    return KVWaste(len({i for seq in running for i in seq.block_ids}) * BLOCK_SIZE, empty)


def run_and_count(rig) -> KVWaste:
    """Run to the end; the truth summed over the recorded steps."""
    held = empty = 0
    while rig.engine.has_work:
        if rig.step().record is not None:
            now = slots_now(rig.engine)
            held, empty = held + now.held_slots, empty + now.empty_slots
    return KVWaste(held, empty)


@pytest.mark.parametrize("max_inflight", [1, 2])
def test_records_tell_the_waste_of_every_step(make_rig, max_inflight):
    """Prefixes are shared, chunks cut, sequences preempted, and some end while their next step is in flight."""
    rig = make_rig(
        num_blocks=40, max_batched_tokens=64, max_num_seqs=6, max_model_len=400, runner={"max_inflight": max_inflight}
    )  # fmt: skip
    random, shared = Random(3), list(range(70))
    for i in range(24):
        prompt = (
            [*shared, i] if i % 3 == 0 else [random.randrange(250) for _ in range(random.randint(1, 120))]
        )
        rig.add(f"r{i}", prompt, max_tokens=random.randint(1, 90), stop_token_ids=(7,))
    truth = run_and_count(rig)
    assert sum(len(step.preempted) for step in rig.steps) > 0
    assert any(step.prefix_hits for step in rig.steps)
    assert kv_waste(rig.steps, num_blocks=40, block_size=BLOCK_SIZE) == truth
    assert 0.0 < truth.share < 1.0


def test_waste_is_at_most_two_percent_at_serving_lengths(make_rig):
    """Prompts and outputs of 1,024 tokens on average, as in the serving benchmarks, all at once."""
    rig = make_rig(
        num_blocks=4096, max_batched_tokens=2048, max_num_seqs=32, max_model_len=4096, enable_prefix_cache=False,
        runner={"verify": False}, with_tokenizer=False,
    )  # fmt: skip
    random = Random(0)
    for i in range(32):
        prompt = [random.randrange(1, 250) for _ in range(random.randint(1, 2047))]
        rig.add(f"r{i}", prompt, max_tokens=random.randint(1, 2047), ignore_eos=True)
    while rig.engine.has_work:
        output = rig.engine.step()
        if output.record is not None:
            rig.steps.append(output.record)
    share = kv_waste(rig.steps, num_blocks=4096, block_size=BLOCK_SIZE).share
    assert 0.0 < share <= 0.02


def test_a_short_sequence_wastes_what_its_length_says(make_rig):
    """20 to 23 tokens in two blocks of 16: 12, 11, 10 and 9 of 32 slots are empty; the last token needs none."""
    rig = make_rig(num_blocks=8, runner={"max_inflight": 1})
    rig.add("r", list(range(20)), max_tokens=5, ignore_eos=True)
    rig.run()
    # The step that ends the request gives its blocks back: four records hold blocks.
    found = kv_waste(rig.steps, num_blocks=8, block_size=BLOCK_SIZE)
    assert found == KVWaste(held_slots=4 * 32, empty_slots=12 + 11 + 10 + 9)
    assert found.share == pytest.approx(42 / 128)


def test_nothing_held_wastes_nothing():
    assert kv_waste([], num_blocks=8, block_size=16).share == 0.0
