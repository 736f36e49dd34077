"""Scheduler: budget, order, chunking, sharing, preemption, stopping, and results that come too late."""

from __future__ import annotations

import pytest

from engine.cache.block_pool import BlockPool
from engine.cache.host_tier import HostTier
from engine.cache.sequence_blocks import SequenceBlocks
from engine.plan import NO_COPIES, StepPlan, StepResult
from engine.request import FinishReason, Request, Sequence, SequenceStatus
from engine.sampling_params import SamplingParams
from engine.scheduler import Commit, Scheduler

EOS = 99


class Bench:
    """A scheduler, its plans, and results chosen by the test."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        budget: int = 64,
        max_num_seqs: int = 8,
        cache: bool = True,
        num_slots: int = 0,
    ) -> None:
        pool = BlockPool(num_blocks, HostTier(num_slots) if num_slots else None)
        blocks = SequenceBlocks(pool, block_size, version_digest="v", enable_prefix_cache=cache)
        self.scheduler = Scheduler(
            blocks, max_batched_tokens=budget, max_num_seqs=max_num_seqs, eos_token_ids=frozenset({EOS})
        )
        self.pool = blocks.pool
        self.plans: list[StepPlan] = []  # in flight

    def add(
        self, name: str, prompt: list[int], max_tokens: int = 8, salt: str = "", **params: object
    ) -> Sequence:
        request = Request(
            name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **params), cache_salt=salt
        )
        seq = Sequence(request, list(prompt), len(prompt), len(prompt) + max_tokens)
        self.scheduler.add(seq)
        return seq

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        self.scheduler.check_integrity()
        if plan is not None:
            self.plans.append(plan)
        return plan

    def commit(self, *tokens: int) -> Commit:
        """Take in the oldest plan; missing tokens are 1, 2, 3 … by row."""
        plan = self.plans.pop(0)
        chosen = [*tokens, *range(len(tokens) + 1, len(plan.logit_rows) + 1)]
        commit = self.scheduler.commit(StepResult(plan.step_id, chosen[: len(plan.logit_rows)]))
        self.scheduler.check_integrity()
        return commit

    def run(self, *tokens: int) -> Commit:
        assert self.plan() is not None
        return self.commit(*tokens)


def counts(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return plan.num_tokens.tolist()


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks_and_samples_once() -> None:
    bench = Bench(budget=6)
    seq = bench.add("a", list(range(1, 15)))
    plans = [bench.plan(), bench.plan(), bench.plan()]
    assert [(p.start.tolist(), counts(p), p.logit_rows.tolist()) for p in plans if p] == [
        ([0], [6], []),
        ([6], [6], []),
        ([12], [2], [0]),
    ]
    assert bench.commit().token_ids == []
    assert bench.commit().token_ids == []
    assert bench.commit(42).token_ids == [42]
    assert seq.output_token_ids == [42]


def test_decode_and_prefill_share_one_step_decode_rows_first() -> None:
    bench = Bench(budget=8)
    bench.add("a", [1, 2, 3])
    bench.run()
    bench.add("b", [4] * 20)
    plan = bench.plan()
    assert counts(plan) == [1, 7]
    assert plan is not None
    assert plan.start.tolist() == [3, 0]
    assert plan.logit_rows.tolist() == [0]
    assert [a.request_id for a in plan.admitted] == ["b"]
    step = bench.scheduler.inflight[-1]
    assert step.rows() == (("a", 1), ("b", 7))
    assert (step.num_decode_tokens, step.num_tokens) == (1, 8)


def test_the_last_token_of_a_prompt_counts_as_prefill_though_it_is_computed_alone() -> None:
    bench = Bench(budget=4)
    bench.add("a", [1, 2, 3, 4, 5])
    plans = [bench.plan(), bench.plan(), bench.plan()]
    assert [(p.start.tolist(), counts(p), p.logit_rows.tolist()) for p in plans if p] == [
        ([0], [4], []),
        ([4], [1], [0]),
        ([5], [1], [0]),
    ]
    assert [step.num_decode_tokens for step in bench.scheduler.inflight] == [0, 0, 1]


def test_running_sequences_are_served_before_waiting_ones() -> None:
    bench = Bench(budget=2)
    bench.add("a", [1])
    bench.add("b", [2])
    bench.run()
    bench.add("c", [3])
    assert counts(bench.plan()) == [1, 1]
    assert [seq.request_id for seq in bench.scheduler.running] == ["a", "b"]
    assert list(bench.scheduler.waiting) == ["c"]


def test_a_step_is_planned_on_a_token_that_is_not_known_yet() -> None:
    bench = Bench()
    seq = bench.add("a", [1, 2, 3])
    bench.plan()
    plan = bench.plan()
    assert plan is not None
    assert plan.start.tolist() == [3]
    assert (seq.token_ids, bench.scheduler.num_scheduled(seq)) == ([1, 2, 3], 4)
    bench.commit(7)
    assert seq.token_ids == [1, 2, 3, 7]
    bench.commit(8)
    assert (seq.token_ids, bench.scheduler.num_scheduled(seq)) == ([1, 2, 3, 7, 8], 4)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nothing_is_planned_beyond_max_tokens(depth: int) -> None:
    bench = Bench()
    seq = bench.add("a", [1, 2], max_tokens=3)
    scheduled = 0
    while bench.scheduler.has_work:
        for _ in range(depth - len(bench.plans)):
            plan = bench.plan()
            scheduled += plan.total_tokens if plan else 0
        finished = bench.commit().finished
    assert scheduled == 2 + 3 - 1, "the last token needs no KV"
    assert [(f.seq, f.reason) for f in finished] == [(seq, FinishReason.LENGTH)]
    assert len(seq.output_token_ids) == 3


def test_a_stop_in_one_step_drops_the_results_of_the_steps_behind_it() -> None:
    bench = Bench()
    seq, other = bench.add("a", [1, 2]), bench.add("b", [3, 4])
    bench.plan()
    bench.plan()
    first = bench.commit(EOS, 5)
    assert [(f.seq, f.reason, f.stop_reason) for f in first.finished] == [(seq, FinishReason.STOP, None)]
    second = bench.commit(6, 7)
    assert (second.sequences, second.token_ids) == ([other], [7])
    assert seq.output_token_ids == [EOS]


def test_blocks_and_rows_of_a_finished_sequence_serve_the_next_plan() -> None:
    bench = Bench(num_blocks=2, max_num_seqs=1)
    bench.add("a", [1, 2, 3, 4, 5])
    bench.add("b", [6, 7, 8, 9, 10])
    bench.run(EOS)
    plan = bench.plan()
    assert plan is not None
    assert plan.finished == (0,)
    assert [(a.request_id, a.row) for a in plan.admitted] == [("b", 0)]


def test_an_abort_frees_blocks_at_once_and_drops_the_result() -> None:
    bench = Bench(num_blocks=4)
    bench.add("a", list(range(10)))
    other = bench.add("b", [50])
    bench.plan()
    assert bench.pool.num_free == 0
    aborted = bench.scheduler.abort("a")
    bench.scheduler.check_integrity()
    assert bench.pool.num_free == 3
    commit = bench.commit(5, 6)
    assert commit.sequences == [other]
    assert aborted is not None
    assert aborted.finish_reason is FinishReason.ABORT
    assert bench.scheduler.abort("a") is None


def test_min_tokens_holds_back_the_end_of_sequence_and_stop_ids() -> None:
    bench = Bench()
    seq = bench.add("a", [1], min_tokens=3, stop_token_ids=(5,))
    for token in (EOS, 5):
        assert bench.run(token).finished == []
    finish = bench.run(5).finished[0]
    assert (finish.reason, finish.stop_reason) == (FinishReason.STOP, 5)
    assert seq.output_token_ids == [EOS, 5, 5]


def test_ignore_eos_still_heeds_stop_token_ids() -> None:
    bench = Bench()
    bench.add("a", [1], ignore_eos=True, stop_token_ids=(5,))
    assert bench.run(EOS).finished == []
    assert bench.run(5).finished[0].stop_reason == 5


def test_one_requests_stop_token_is_an_ordinary_token_for_another() -> None:
    bench = Bench()
    bench.add("a", [1], stop_token_ids=(5,))
    bench.add("b", [2])
    assert [f.seq.request_id for f in bench.run(5, 5).finished] == ["a"]


# ── prefix cache ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_blocks_are_matchable_only_after_their_step_was_committed() -> None:
    bench = Bench()
    bench.add("a", list(range(9)))
    bench.plan()
    assert bench.pool.num_published == 0
    bench.commit()
    assert bench.pool.num_published == 2


def test_a_second_request_takes_the_shared_full_blocks() -> None:
    bench = Bench()
    bench.add("a", [*range(10), 50])
    bench.run()
    seq = bench.add("b", [*range(10), 60])
    plan = bench.plan()
    assert plan is not None
    assert plan.admitted[0].num_computed == seq.num_cached_tokens == 8
    assert plan.admitted[0].block_ids[0][:2] == tuple(bench.scheduler.running[0].block_ids[:2])
    assert bench.scheduler.inflight[-1].prefix_hits == [("b", 8)]


def test_a_full_prompt_hit_computes_at_least_one_token() -> None:
    bench = Bench()
    bench.add("a", list(range(8)))
    bench.run(EOS)
    bench.add("b", list(range(8)))
    plan = bench.plan()
    assert plan is not None
    assert (plan.start.tolist(), plan.num_tokens.tolist()) == ([4], [4])
    assert plan.logit_rows.tolist() == [0]


def test_output_tokens_are_matched_too() -> None:
    bench = Bench()
    bench.add("a", [1, 2, 3], max_tokens=6)
    for token in (4, 5, 6, 7, 8, 9):
        bench.run(token)
    seq = bench.add("b", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    bench.plan()
    assert seq.num_cached_tokens == 8


@pytest.mark.parametrize("budget", [7, 1, 64])
def test_blocks_are_named_alike_however_they_were_cut_into_steps(budget: int) -> None:
    bench = Bench(budget=budget)
    seq = bench.add("a", [1, 2, 3, 4, 5, 6, 7, 8], max_tokens=6)
    token = 9
    while seq.finish_reason is None:
        token += len(bench.run(token).token_ids)
    again = bench.add("b", [*range(1, 14), 50])
    bench.plan()
    assert again.num_cached_tokens == 12


@pytest.mark.parametrize("prompt_length", [9, 2])
def test_another_salt_shares_neither_prompt_nor_output_blocks(prompt_length: int) -> None:
    bench = Bench()
    tokens = list(range(9))
    bench.add("a", tokens[:prompt_length], max_tokens=9 - prompt_length + 1, salt="one")
    for token in [*tokens[prompt_length:], 9]:
        bench.run(token)
    shared = bench.add("b", [*tokens, 9, 9], salt="one")
    others = [bench.add("c", [*tokens, 9, 9], salt="two"), bench.add("d", [*tokens, 9, 9])]
    bench.plan()
    assert shared.num_cached_tokens == 8
    assert [seq.num_cached_tokens for seq in others] == [0, 0]
    assert all(seq.status is SequenceStatus.RUNNING for seq in others), "they wait for nobody's blocks"


def test_prompt_logprobs_need_every_position_and_read_no_cache() -> None:
    bench = Bench()
    bench.add("a", list(range(9)))
    bench.run()
    bench.add("b", list(range(9)), prompt_logprobs=0)
    plan = bench.plan()
    assert plan is not None
    assert plan.admitted[0].num_computed == 0


def test_a_switched_off_cache_shares_nothing() -> None:
    bench = Bench(cache=False)
    bench.add("a", list(range(9)))
    bench.run()
    seq = bench.add("b", list(range(9)))
    bench.plan()
    assert (seq.num_cached_tokens, bench.pool.num_published) == (0, 0)


def test_requests_that_arrive_together_compute_their_shared_prefix_once() -> None:
    bench = Bench()
    seqs = [bench.add(name, [*range(9), i]) for i, name in enumerate("abc")]
    other = bench.add("d", [70, 71])
    plan = bench.plan()
    assert plan is not None
    assert [a.request_id for a in plan.admitted] == ["a", "d"], (
        "b and c wait for a's blocks, d passes them by"
    )
    bench.commit()
    bench.plan()
    assert [seq.num_cached_tokens for seq in seqs] == [0, 8, 8]
    assert other.num_cached_tokens == 0


def test_who_shares_a_long_prefix_waits_for_all_of_it() -> None:
    bench = Bench(budget=8)
    bench.add("a", [*range(30), 1])
    seq = bench.add("b", [*range(30), 2])
    while seq.status is SequenceStatus.WAITING:
        bench.run()
    assert seq.num_cached_tokens == 28


def test_who_waits_for_anothers_prefix_goes_on_when_that_one_is_aborted() -> None:
    bench = Bench()
    bench.add("a", [*range(9), 1])
    waiting = bench.add("b", [*range(9), 2])
    bench.plan()
    assert waiting.status is SequenceStatus.WAITING
    bench.scheduler.abort("a")
    bench.commit()
    plan = bench.plan()
    assert plan is not None
    assert plan.num_tokens.tolist() == [10]


# ── preemption ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_out_of_blocks_the_tail_is_preempted_and_recomputed_with_its_tokens() -> None:
    bench = Bench(num_blocks=4, cache=False)
    head, tail = bench.add("a", [1] * 7, max_tokens=6), bench.add("b", [2] * 7, max_tokens=6)
    bench.run(11, 21)
    bench.run(12, 22)  # both fill their second block; the pool is empty
    plan = bench.plan()
    assert plan is not None
    assert plan.rows.tolist() == [head.row]
    assert plan.finished != ()
    assert tail.status is SequenceStatus.WAITING
    assert tail.token_ids == [*[2] * 7, 21, 22]
    assert bench.scheduler.inflight[-1].preempted == [tail]
    while head.finish_reason is None:
        bench.commit()
        bench.plan()
    readmitted = next(a for p in bench.plans for a in p.admitted)
    assert list(readmitted.token_ids) == [*[2] * 7, 21, 22]
    assert readmitted.num_prompt_tokens == 7
    assert tail.num_preemptions == bench.scheduler.num_preemptions == 1


def test_a_result_from_before_the_preemption_is_dropped_even_after_readmission() -> None:
    bench = Bench(num_blocks=4, cache=False)
    head, tail = bench.add("a", [1] * 7, max_tokens=3), bench.add("b", [2] * 7, max_tokens=3)
    bench.plan()
    bench.plan()  # in flight: both choose their 2nd token
    bench.commit(11, 21)
    bench.plan()  # head needs a third block: tail goes, with a token in flight
    assert tail.token_ids == [*[2] * 7, 21]
    commit = bench.commit(12, 22)
    assert (commit.sequences, commit.token_ids) == ([head], [12])
    assert tail.token_ids == [*[2] * 7, 21]
    bench.commit(13)
    assert head.finish_reason is FinishReason.LENGTH
    assert bench.run(22).token_ids == [22]
    assert tail.output_token_ids == [21, 22]


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    bench = Bench(num_blocks=5)
    head, tail = bench.add("a", [1] * 7, max_tokens=10), bench.add("b", [2] * 7, max_tokens=10)
    while not tail.num_preemptions:
        bench.run()
    head_tokens = head.num_tokens
    bench.scheduler.abort("a")
    plan = bench.plan()
    assert plan is not None
    assert head_tokens > 7
    assert plan.admitted[0].num_computed > 0, "its own published blocks were still there"
    assert tail.num_cached_tokens == 0


def test_a_preemption_is_told_even_if_its_plan_computes_nothing() -> None:
    bench = Bench(num_blocks=4, cache=False)
    head, tail = bench.add("a", [1] * 7, max_tokens=2), bench.add("b", [2] * 7, max_tokens=3)
    bench.plan()
    bench.plan()
    assert bench.plan() is None, (
        "head's last token is in flight, and tail had to go for want of a third block"
    )
    assert tail.num_preemptions == 1
    bench.commit()
    bench.commit()
    assert head.finish_reason is FinishReason.LENGTH
    bench.plan()
    assert bench.scheduler.inflight[-1].preempted == [tail]
    bench.commit()
    bench.plan()
    assert bench.scheduler.inflight[-1].preempted == []


def test_the_only_sequence_is_never_preempted_when_it_fits() -> None:
    bench = Bench(num_blocks=3)
    seq = bench.add("a", [1] * 5, max_tokens=8)
    while bench.scheduler.has_work:
        bench.run()
    assert seq.num_preemptions == 0
    assert len(seq.output_token_ids) == 8


def test_a_waiting_sequence_is_not_admitted_in_a_step_that_preempts() -> None:
    bench = Bench(num_blocks=4, cache=False)
    bench.add("a", [1] * 7, max_tokens=6)
    bench.add("b", [2] * 7, max_tokens=6)
    bench.run()
    bench.run()
    bench.add("c", [3])
    plan = bench.plan()
    assert plan is not None
    assert plan.admitted == ()


def test_who_does_not_fit_now_waits_and_is_not_overtaken_for_ever() -> None:
    bench = Bench(num_blocks=4, cache=False)
    bench.add("a", [1] * 9, max_tokens=3)
    big = bench.add("b", [2] * 14, max_tokens=2)
    small = bench.add("c", [3], max_tokens=2)
    order = []
    while bench.scheduler.has_work:
        order += [f.seq for f in bench.run().finished]
    assert order.index(big) < order.index(small)


# ── failure ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_step_ends_its_sequences_and_requeues_the_others_in_order() -> None:
    bench = Bench(budget=4)
    first = bench.add("a", [1])
    bench.plan()
    failed_step = bench.scheduler.inflight[0]
    bench.add("b", [2])
    bench.add("c", [3])
    bench.plan()
    bench.add("d", [4])
    assert bench.scheduler.fail(failed_step) == [first]
    bench.scheduler.check_integrity()
    assert first.finish_reason is FinishReason.ERROR
    assert list(bench.scheduler.waiting) == ["b", "c", "d"]
    assert not bench.scheduler.inflight
    plan = bench.plan()
    assert plan is not None
    assert plan.finished == (), "the runner forgot its rows: none is given back"
    assert [list(a.token_ids) for a in plan.admitted] == [[2], [3], [4]]


def test_a_failed_step_makes_nothing_matchable() -> None:
    bench = Bench()
    bench.add("a", list(range(9)))
    bench.plan()
    bench.scheduler.fail(bench.scheduler.inflight[0])
    assert bench.pool.num_published == 0
    assert bench.pool.num_free == bench.pool.num_blocks


# ── integrity ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("damage", ["row", "block", "token", "count", "decoding", "queue", "announced"])
def test_check_integrity_notices_damage(damage: str) -> None:
    bench = Bench()
    seq = bench.add("a", list(range(9)))
    bench.run()
    scheduler = bench.scheduler
    match damage:
        case "row":
            scheduler._free_rows.append(seq.row)
        case "block":
            seq.block_ids.append(40)
        case "token":
            seq.token_ids.pop()
        case "count":
            scheduler._num_scheduled[seq.row] = 1
        case "decoding":
            seq.is_decoding = False
        case "queue":
            scheduler.running.clear()
        case "announced":
            scheduler.blocks._announced[b"digest"] = bench.add("b", [1])
    with pytest.raises(AssertionError):
        scheduler.check_integrity()


def test_a_result_out_of_order_is_refused() -> None:
    bench = Bench()
    bench.add("a", [1, 2])
    bench.plan()
    bench.plan()
    with pytest.raises(AssertionError, match="result of step 1"):
        bench.scheduler.commit(StepResult(1, [5]))


# ── the host tier ───────────────────────────────────────────────────────────────────────────────────────────────────────

PROMPT = list(range(1, 14))  # three full blocks and a token


def driven_out(num_blocks: int = 4) -> Bench:
    """`PROMPT` was answered with one token, then another prompt took all blocks but the one of its head."""
    bench = Bench(num_blocks=num_blocks, num_slots=8)
    bench.add("first", PROMPT, max_tokens=1)
    assert bench.plan().copies is NO_COPIES
    bench.commit()
    bench.add("other", [50] * (4 * (num_blocks - 1) - 3), max_tokens=1)
    assert bench.plan().copies.out.tolist() == [[2, 0], [1, 1]], "the tail goes first"
    bench.commit()
    return bench


def test_a_prompt_that_was_driven_out_returns_by_copies_and_is_matchable_when_they_are_made() -> None:
    bench = driven_out()
    seq = bench.add("again", PROMPT)
    plan = bench.plan()
    assert plan is not None
    (admission,) = plan.admitted
    assert (admission.num_computed, seq.num_cached_tokens, counts(plan)) == (12, 12, [1])
    assert bench.scheduler.inflight[-1].prefix_hits == [("again", 12)]
    table = admission.block_ids[0]
    assert table[0] == 0, "the head had stayed in the pool"
    assert plan.copies.back.tolist() == [[1, table[1]], [0, table[2]]]
    assert [bench.pool.is_published(block) for block in table] == [True, False, False, False]
    bench.commit()
    assert [bench.pool.is_published(block) for block in table] == [True, True, True, False]
    assert bench.plan().copies is NO_COPIES


def test_what_one_sequence_brings_another_awaits_and_shares() -> None:
    bench = driven_out(num_blocks=8)
    a, b = bench.add("a", PROMPT, max_tokens=2), bench.add("b", PROMPT[:12], max_tokens=2)
    assert [admission.request_id for admission in bench.plan().admitted] == ["a"]
    assert bench.plan() is not None
    assert not bench.plans[-1].admitted, "b waits for blocks that are on their way"
    bench.commit()
    assert b.status is SequenceStatus.WAITING
    bench.commit()
    plan = bench.plan()
    assert plan is not None
    assert not len(plan.copies.back)
    assert b.num_cached_tokens == 8
    assert a.status is SequenceStatus.FINISHED


def test_after_a_failed_step_what_it_saved_is_gone_and_what_it_read_is_there() -> None:
    bench = driven_out()
    seq = bench.add("again", PROMPT)
    plan = bench.plan()
    assert plan is not None
    saved = set(plan.copies.out[:, 1].tolist())
    assert len(saved) == 2, "the other prompt's blocks"
    tier = bench.pool.tier
    assert tier is not None
    assert tier.num_cached == 4
    assert bench.scheduler.fail(bench.scheduler.inflight[0]) == [seq]
    bench.plans.clear()
    bench.scheduler.check_integrity()
    assert tier.num_cached == 2
    bench.add("once more", PROMPT)
    plan = bench.plan()
    assert plan is not None
    assert plan.admitted[0].num_computed == 12
    assert len(plan.copies.back) == 2
