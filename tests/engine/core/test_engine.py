"""Engine: streams, shared prefixes, mixed steps, records and counters."""

from __future__ import annotations

import pickle

import pytest

from engine.errors import ConfigError, EngineDeadError, InvalidRequestError
from engine.fake_runner import expected_tokens, fake_logprobs, scripted
from engine.records import BlockEventKind
from engine.request import FinishReason
from engine.sampling_params import SamplingParams

PREFIX = [(7 * i) % 256 for i in range(500)]


def test_a_request_gives_the_tokens_that_it_gives_alone(make_rig) -> None:
    rig = make_rig(max_batched_tokens=7)
    prompts = {f"r{i}": PREFIX[i : 2 * i + 5] for i in range(9)}
    for name, prompt in prompts.items():
        rig.add(name, prompt, max_tokens=20)
    rig.run()
    for name, prompt in prompts.items():
        assert rig.tokens(name) == expected_tokens(prompt, 20, 256)
        assert rig.last(name).finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("max_inflight", [1, 2, 3])
def test_a_result_comes_as_late_as_the_runner_allows(make_rig, max_inflight: int) -> None:
    rig = make_rig(runner={"max_inflight": max_inflight})
    rig.add("a", [1, 2, 3], max_tokens=9)
    outputs = [rig.step() for _ in range(max_inflight)]
    assert [len(output.deltas) for output in outputs] == [0] * (max_inflight - 1) + [1]
    rig.run()
    assert rig.tokens("a") == expected_tokens([1, 2, 3], 9, 256)


@pytest.mark.parametrize("others_come", ["while the first decodes", "all at once"])
def test_eight_prompts_share_their_full_prefix_blocks_exactly(make_rig, others_come: str) -> None:
    rig = make_rig(num_blocks=512, max_batched_tokens=256)
    prompts = {f"r{i}": [*PREFIX, 100 + i, 7] for i in range(8)}
    rig.add("r0", prompts["r0"], max_tokens=64)
    if others_come == "while the first decodes":
        while not rig.tokens("r0"):
            rig.step()
    for name, prompt in list(prompts.items())[1:]:
        rig.add(name, prompt, max_tokens=16)
    rig.run()
    shared_full_blocks = len(PREFIX) // 16
    cached = {name: rig.requests[name].num_cached_tokens for name in prompts}
    assert cached == {"r0": 0} | {f"r{i}": 16 * shared_full_blocks for i in range(1, 8)}
    assert all(rig.last(name).num_cached_tokens == cached[name] for name in prompts)
    assert rig.requests["r0"].finished_ns > max(rig.requests[f"r{i}"].finished_ns for i in range(1, 8))
    for name, prompt in prompts.items():
        assert rig.tokens(name) == expected_tokens(prompt, 64 if name == "r0" else 16, 256)
    assert rig.engine.stats().cached_prompt_tokens == 7 * 16 * shared_full_blocks


def test_one_step_computes_prefill_and_decode_rows_of_several_requests(make_rig) -> None:
    rig = make_rig()
    for name in ("a", "b"):
        rig.add(name, [*PREFIX, ord(name)], max_tokens=32)
    while len(rig.tokens("a")) < 4:
        rig.step()
    for name in ("c", "d"):
        rig.add(name, [*PREFIX, ord(name), *range(40)], max_tokens=4)
    rig.run()
    mixed = [step for step in rig.steps if step.num_prefill_tokens and step.num_decode_tokens]
    rows = dict(mixed[-1].rows)
    assert rows["a"] == rows["b"] == 1
    assert rows["c"] > 1
    assert rows["d"] > 1
    assert mixed[-1].num_decode_tokens == 2
    assert dict(mixed[-1].prefix_hits) == {"c": 496, "d": 496}


# ── ends ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_end_of_sequence_token_ends_the_stream_and_is_its_last_token(make_rig) -> None:
    rig = make_rig(runner={"choose": scripted("hello")})
    rig.add("a", "hi", max_tokens=50)
    rig.run()
    assert rig.tokens("a") == [*b"hello", 256]
    assert (rig.last("a").finish_reason, rig.last("a").stop_reason) == (FinishReason.STOP, None)


def test_the_context_is_an_end_as_max_tokens_is(make_rig) -> None:
    rig = make_rig(max_model_len=20)
    rig.add("a", PREFIX[:15], max_tokens=None)
    rig.add("b", PREFIX[:15], max_tokens=50)
    rig.run()
    assert len(rig.tokens("a")) == len(rig.tokens("b")) == 5
    assert rig.last("a").finish_reason is FinishReason.LENGTH


def test_a_stop_text_is_cut_off_and_never_shown_in_part(make_rig) -> None:
    rig = make_rig(runner={"choose": scripted("one two END three")})
    rig.add("a", "hi", max_tokens=50, stop=("END", "never"))
    seen = []
    while rig.engine.has_work:
        rig.step()
        seen.append(rig.text("a"))
    assert seen[-1] == "one two "
    assert all("one two ".startswith(text) for text in seen)
    assert (rig.last("a").finish_reason, rig.last("a").stop_reason) == (FinishReason.STOP, "END")
    assert rig.engine.stats().num_free_blocks == 256


def test_text_held_back_is_shown_when_it_was_no_stop_text(make_rig) -> None:
    rig = make_rig(runner={"choose": scripted("an E, EN, EN")})
    rig.add("a", "hi", max_tokens=50, stop=("END",))
    rig.run()
    assert rig.text("a") == "an E, EN, EN"


def test_a_stop_text_before_min_tokens_does_not_end(make_rig) -> None:
    rig = make_rig(runner={"choose": scripted("abab")})
    rig.add("a", "hi", max_tokens=50, min_tokens=3, stop=("ab",))
    rig.run()
    assert rig.text("a") == "ab"
    assert rig.tokens("a") == [*b"abab"]


def test_a_stop_token_is_not_part_of_the_text(make_rig) -> None:
    rig = make_rig(runner={"choose": scripted("one\ntwo")})
    rig.add("a", "hi", max_tokens=50, stop=("never",), stop_token_ids=(10,))
    rig.run()
    assert rig.text("a") == "one"
    assert rig.last("a").stop_reason == 10


def test_the_stop_text_is_kept_where_it_was_asked_for(make_rig) -> None:
    rig = make_rig(runner={"choose": scripted("one END")})
    rig.add("a", "hi", max_tokens=50, stop=("END",), include_stop_str_in_output=True)
    rig.run()
    assert rig.text("a") == "one END"


def test_an_abort_is_told_within_one_step_and_frees_everything(make_rig) -> None:
    rig = make_rig()
    rig.add("a", PREFIX, max_tokens=50)
    rig.add("b", [1, 2, 3], max_tokens=50)
    rig.step()
    rig.step()
    held = rig.engine.stats().num_free_blocks
    rig.engine.abort("a")
    assert rig.engine.stats().num_free_blocks == held + 32
    output = rig.step()
    assert [d.finish_reason for d in output.deltas if d.request_id == "a"] == [FinishReason.ABORT]
    rig.engine.abort("a")  # a second time, and of what never was: nothing happens
    rig.engine.abort("nobody")
    rig.run()
    assert rig.tokens("b") == expected_tokens([1, 2, 3], 50, 256)
    assert rig.engine.stats().finished == {"abort": 1, "length": 1}


def test_an_abort_while_nothing_runs_is_told_too(make_rig) -> None:
    rig = make_rig(runner={"max_inflight": 1})
    rig.add("a", PREFIX[:40], max_tokens=50)
    rig.step()
    rig.engine.abort("a")
    assert rig.engine.has_work
    output = rig.step()
    assert [d.finish_reason for d in output.deltas] == [FinishReason.ABORT]
    assert output.record is not None
    assert [e.kind for e in output.record.block_events] == [BlockEventKind.RELEASE]
    assert not rig.engine.has_work


# ── log-probabilities ───────────────────────────────────────────────────────────────────────────────────────────────


def test_logprobs_come_with_their_tokens(make_rig) -> None:
    rig = make_rig()
    rig.add("a", [1, 2], max_tokens=5, logprobs=2)
    rig.add("b", [1, 2], max_tokens=5)
    rig.run()
    entries = [entry for delta in rig.deltas["a"] for entry in delta.logprobs]
    assert entries == [fake_logprobs(token, 2, 256) for token in rig.tokens("a")]
    assert all(delta.logprobs == () for delta in rig.deltas["b"])


@pytest.mark.parametrize("preempted", [False, True])
def test_prompt_logprobs_of_all_chunks_come_once_with_the_first_delta(make_rig, preempted: bool) -> None:
    prompt = PREFIX[:41]
    rig = make_rig(num_blocks=5 if preempted else 64, max_batched_tokens=9, enable_prefix_cache=False)
    if preempted:
        rig.add("head", PREFIX[:10], max_tokens=60)
    rig.add("a", prompt, max_tokens=12, prompt_logprobs=0)
    rig.run()
    assert (rig.requests["a"].num_preemptions > 0) == preempted
    first, *others = rig.deltas["a"]
    assert list(first.prompt_logprobs) == [fake_logprobs(token, 0, 256) for token in prompt[1:]]
    assert all(delta.prompt_logprobs == () for delta in others)


@pytest.mark.parametrize("budget", [1, 7, 40, 41, 64])
def test_a_prompt_that_is_only_scored_generates_nothing(make_rig, budget: int) -> None:
    prompt = PREFIX[:41]
    rig = make_rig(max_batched_tokens=budget, max_num_seqs=1)
    rig.add("a", prompt, max_tokens=0, prompt_logprobs=2)
    rig.run()
    (delta,) = rig.deltas["a"]
    assert (delta.token_ids, delta.finish_reason) == ((), FinishReason.LENGTH)
    assert list(delta.prompt_logprobs) == [fake_logprobs(token, 2, 256) for token in prompt[1:]]
    assert all(not len(plan.logit_rows) for plan in rig.runner.plans)


def test_tokens_before_the_first_scored_one_come_from_the_cache(make_rig) -> None:
    prompt = PREFIX[:41]
    rig = make_rig()
    rig.add("a", prompt, max_tokens=1)
    rig.run()
    rig.add("b", prompt, max_tokens=0, prompt_logprobs=0, logprob_start_len=33)
    rig.run()
    (delta,) = rig.deltas["b"]
    assert list(delta.prompt_logprobs) == [fake_logprobs(token, 0, 256) for token in prompt[33:]]
    assert delta.num_cached_tokens == 32, "the token before the first scored one is computed"


# ── preemption ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_preempted_requests_give_the_tokens_that_they_give_alone(make_rig) -> None:
    rig = make_rig(num_blocks=12, block_size=4, max_batched_tokens=16)
    prompts = {f"r{i}": PREFIX[3 * i : 3 * i + 9] for i in range(5)}
    for name, prompt in prompts.items():
        rig.add(name, prompt, max_tokens=24)
    rig.run()
    assert rig.engine.stats().preemptions > 0
    assert {name for step in rig.steps for name in step.preempted} <= set(prompts)
    assert sum(record.num_preemptions for record in rig.requests.values()) == rig.engine.stats().preemptions
    for name, prompt in prompts.items():
        assert rig.tokens(name) == expected_tokens(prompt, 24, 256)


# ── records ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_records_count_every_token_and_keep_their_times_in_order(make_rig) -> None:
    rig = make_rig(max_batched_tokens=100)
    rig.add("a", PREFIX[:250], max_tokens=10)
    rig.add("b", [5, 6, 7], max_tokens=10)
    rig.run()
    assert sum(step.num_prefill_tokens for step in rig.steps) == 253
    assert sum(step.num_decode_tokens for step in rig.steps) == 2 * 9
    assert [step.step_id for step in rig.steps] == list(range(len(rig.steps)))
    assert all(step.started_ns <= step.ended_ns for step in rig.steps)
    record = rig.requests["a"]
    assert record.arrival_ns <= record.admitted_ns < record.first_token_ns <= record.finished_ns
    assert record.token_ns == tuple(delta.created_ns for delta in rig.deltas["a"])
    assert (record.num_prompt_tokens, record.num_output_tokens) == (250, 10)
    stats = rig.engine.stats()
    assert (stats.prompt_tokens, stats.output_tokens, stats.steps) == (253, 20, len(rig.steps))


def test_a_keyframe_comes_with_the_first_record_and_every_256th(make_rig) -> None:
    rig = make_rig(num_blocks=64)
    rig.add("a", [1, 2, 3], max_tokens=600)
    rig.run()
    assert [i for i, step in enumerate(rig.steps) if step.keyframe is not None] == [0, 256, 512]
    keyframe = rig.steps[256].keyframe
    assert len(keyframe.owners["a"]) == -(-(3 + 257) // 16)
    assert len(keyframe.published) == (3 + 256) // 16


def test_a_keyframe_stays_what_it_was_though_tables_grow_and_are_given_back(make_rig) -> None:
    rig = make_rig()
    rig.add("a", PREFIX[:40], max_tokens=40)
    while not rig.steps:
        rig.step()
    keyframe = rig.steps[0].keyframe
    owners = {"a": tuple(rig.engine._scheduler.running[0].block_ids)}
    assert (len(owners["a"]), len(keyframe.published)) == (3, 2)
    assert keyframe.owners == owners
    rig.run()
    assert keyframe.owners == owners


def test_plain_tokens_come_as_one_batch_that_shares_what_steps_have_in_common(make_rig) -> None:
    rig = make_rig()
    for name in ("a", "b", "c", "d"):
        special = {"b": {"logprobs": 1}, "d": {"stop": ("never",)}}.get(name, {})
        rig.add(name, [1, 2, ord(name)], max_tokens=9, ignore_eos=True, **special)
    outputs = []
    while rig.engine.has_work:
        outputs.append(rig.step())
    batches = [output.tokens for output in outputs if output.tokens is not None]
    assert [batch.cohort.request_ids for batch in batches] == [("a", "c")] * 7, (
        "neither a first nor a last token"
    )
    assert len({id(batch.cohort) for batch in batches}) == 1
    for output in outputs:
        assert len({delta.request_id for delta in output.deltas}) == len(output.deltas)
        if output.tokens is not None:
            assert [delta.request_id for delta in output.others] == ["b", "d"]
    assert len({id(step.rows) for step in rig.steps if step.num_decode_tokens == 4}) == 1
    for name in ("a", "b", "c", "d"):
        assert rig.tokens(name) == expected_tokens([1, 2, ord(name)], 9, 256)


def test_what_leaves_the_engine_can_be_pickled(make_rig) -> None:
    rig = make_rig()
    rig.add("a", [1, 2, 3], max_tokens=3, logprobs=1)
    while rig.engine.has_work:
        output = rig.step()
        assert pickle.loads(pickle.dumps(output)) == output


# ── seeds, ids, settings ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_seed_is_drawn_from_the_engines_own_and_one_given_is_kept(make_rig) -> None:
    def drawn(seed: int) -> list[int]:
        engine = make_rig(seed=seed).engine
        return [engine.make_request([1], SamplingParams()).seed for _ in range(3)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 3
    assert make_rig().engine.make_request([1], SamplingParams(seed=-5)).seed == -5


def test_an_id_in_use_is_refused_and_free_again_after_its_request(make_rig) -> None:
    rig = make_rig()
    rig.add("a", [1], max_tokens=1)
    with pytest.raises(InvalidRequestError, match="in use"):
        rig.add("a", [1], max_tokens=1)
    rig.run()
    rig.add("a", [1], max_tokens=1)
    rig.run()


def test_unresolved_settings_and_another_block_size_are_refused(make_rig) -> None:
    with pytest.raises(ConfigError, match="max_model_len is not resolved"):
        make_rig(max_model_len=None)


def test_a_closed_engine_takes_nothing(make_rig) -> None:
    rig = make_rig()
    rig.engine.close()
    rig.engine.close()
    assert rig.runner.closed
    with pytest.raises(EngineDeadError, match="closed"):
        rig.engine.make_request([1], SamplingParams())
    with pytest.raises(EngineDeadError):
        rig.engine.step()
