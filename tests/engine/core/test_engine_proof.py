"""The engine against a model of it that has no batch, no blocks, no cache and no steps in flight.

One harness, driven twice: by Hypothesis, which shrinks what it finds, and by a plain random driver over a million operations
(`make test-full`; QUIRE_PROOF_SEED and QUIRE_PROOF_OPERATIONS override its seed and length). After every operation the
accounting is proven, every plan was checked by the FakeRunner, and each request's tokens are those computed alone.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.config import EngineConfig, SpeculativeConfig
from engine.engine import Engine, StepOutput
from engine.errors import OutOfMemoryError, QueueFullError
from engine.fake_runner import FakeRunner, FakeTokenizer, fake_logprobs, next_state, next_token
from engine.plan import KVSpec, TokenLogprobs
from engine.queue_limit import Backlog, QueueLimit
from engine.records import BlockEventKind
from engine.request import FinishReason, Sequence
from engine.sampling_params import SamplingParams

VOCAB_SIZE = 11
EOS = 7
MAX_MODEL_LEN = 40
MAX_QUEUED = 12  # requests that may wait
MAX_QUEUE_SECONDS = 3600  # no engine of these tests lives so long: who is to be late comes late


@dataclass(frozen=True)
class Shape:
    """A pool and budgets small enough that everything collides."""

    num_blocks: int
    block_size: int
    max_batched_tokens: int
    max_num_seqs: int
    max_inflight: int
    enable_prefix_cache: bool = True
    num_host_blocks: int = 0
    num_guesses: int = 0  # speculative tokens; 0: none
    has_draft_model: bool = False  # that guesses them


@dataclass(frozen=True)
class Alone:
    """What a request gives when it is computed by itself."""

    token_ids: tuple[int, ...]
    reason: FinishReason
    stop_reason: str | int | None
    text: str | None


def alone(prompt: list[int], params: SamplingParams, max_total_tokens: int) -> Alone:
    """Brute force: one token after the other, looking at the whole output each time."""
    state, tokens = 0, []
    for token in prompt:
        state = next_state(state, token)
    if max_total_tokens == len(prompt):
        return Alone((), FinishReason.LENGTH, None, "" if params.stop else None)
    while True:
        token = next_token(state, len(prompt) + len(tokens) - 1, VOCAB_SIZE)
        tokens.append(token)
        state = next_state(state, token)
        may_stop = len(tokens) >= params.min_tokens
        by_id = may_stop and token in params.stop_token_ids
        if by_id or (may_stop and token == EOS and not params.ignore_eos):
            shown = tokens if params.include_stop_str_in_output else tokens[:-1]
            text = bytes(shown).decode() if params.stop else None
            if params.stop and (hit := first_stop(text, params, len(tokens))) is not None:
                return Alone(tuple(tokens), FinishReason.STOP, *hit)
            return Alone(tuple(tokens), FinishReason.STOP, token if by_id else None, text)
        text = bytes(tokens).decode() if params.stop else None
        if params.stop and may_stop and (hit := first_stop(text, params, len(tokens))) is not None:
            return Alone(tuple(tokens), FinishReason.STOP, *hit)
        if len(prompt) + len(tokens) == max_total_tokens:
            return Alone(tuple(tokens), FinishReason.LENGTH, None, text)


def scores_of(prompt: list[int], params: SamplingParams) -> list[TokenLogprobs]:
    if params.prompt_logprobs is None:
        return []
    scored = prompt[max(1, params.logprob_start_len) :]
    return [fake_logprobs(token, params.prompt_logprobs, VOCAB_SIZE) for token in scored]


def first_stop(text: str, params: SamplingParams, num_tokens: int) -> tuple[str, str] | None:
    """(stop text, output) of the earliest stop text that begins at or after token `min_tokens`."""
    free = min(
        max(params.min_tokens - 1, 0), num_tokens
    )  # one byte a token: so many characters are passed over
    hits = [(at, -len(stop), stop) for stop in params.stop if (at := text.find(stop, free)) >= 0]
    if not hits:
        return None
    at, _, stop = min(hits)
    return stop, text[: at + len(stop)] if params.include_stop_str_in_output else text[:at]


def _guesses(num_tokens: int, has_draft_model: bool) -> SpeculativeConfig | None:
    """By a draft model, or guess whatever followed the last token before; the fake model's texts hardly ever repeat more."""
    if not num_tokens:
        return None
    if has_draft_model:
        return SpeculativeConfig(
            method="draft_model", model="fake draft", num_speculative_tokens=num_tokens, min_gain=0
        )
    return SpeculativeConfig(
        num_speculative_tokens=num_tokens, prompt_lookup_min=1, prompt_lookup_max=2, min_gain=0
    )


class Harness:
    """One engine, what was asked of it, and what must come out."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.runner = FakeRunner(
            shape.num_blocks,
            shape.block_size,
            num_host_blocks=shape.num_host_blocks,
            vocab_size=VOCAB_SIZE,
            max_inflight=shape.max_inflight,
        )
        kv_spec = KVSpec(1, 1, 8, shape.block_size, 4)
        config = EngineConfig(
            model="fake",
            block_size=shape.block_size,
            num_blocks=shape.num_blocks,
            swap_space_bytes=shape.num_host_blocks * kv_spec.bytes_per_block,
            max_batched_tokens=shape.max_batched_tokens,
            max_num_seqs=shape.max_num_seqs,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_cache=shape.enable_prefix_cache,
            speculative_config=_guesses(shape.num_guesses, shape.has_draft_model),
            client_weights={"a": 3.0},
            max_queue_seconds=MAX_QUEUE_SECONDS,
        )
        self.queue_limit = QueueLimit(MAX_QUEUED, MAX_QUEUED * MAX_MODEL_LEN // 4)
        self.overdue: set[str] = set()  # those that end unless they begin at once
        self.expired: set[str] = set()  # those that end in the next step, whatever they do
        self.engine = Engine(
            config,
            self.runner,
            kv_spec=kv_spec,
            eos_token_ids=frozenset({EOS}),
            vocab_size=VOCAB_SIZE,
            tokenizer=FakeTokenizer(),
        )
        self.expected: dict[str, Alone] = {}  # of live requests
        self.tokens: dict[str, list[int]] = {}
        self.texts: dict[str, str] = {}
        self.scored: dict[str, list[TokenLogprobs]] = {}
        self.expected_scores: dict[str, list[TokenLogprobs]] = {}
        self.prompts: list[list[int]] = []
        self.aborted: set[str] = set()
        self.owners: dict[str, list[int]] = {}  # replayed from the records alone
        self.published: set[int] = set()
        self.num_added = self.num_finished = 0
        self.head_waits = 0
        self.last_head: str | None = None
        self.seen: set[str] = set()  # what has happened at least once

    @property
    def capacity(self) -> int:
        return self.shape.num_blocks * self.shape.block_size

    def add(
        self,
        prompt: list[int],
        params: SamplingParams,
        salt: str = "",
        priority: int = 0,
        client: str = "",
        *,
        is_overdue: bool = False,
    ) -> None:
        room = min(MAX_MODEL_LEN - (params.max_tokens != 0), self.capacity)
        if not prompt or len(prompt) > room or params.logprob_start_len >= max(1, len(prompt)):
            return
        total = MAX_MODEL_LEN
        if params.max_tokens is not None:
            total = min(len(prompt) + params.max_tokens, MAX_MODEL_LEN)
        if params.max_tokens is not None and total - 1 > self.capacity:
            return
        backlog, now_ns = self.engine.backlog, time.monotonic_ns()
        try:
            self.queue_limit.enter(Backlog(1, len(prompt)), backlog, now_ns)
        except QueueFullError:
            self.seen.add("refused")
            return
        assert not backlog.num_requests or backlog.num_requests < MAX_QUEUED
        request_id = f"r{self.num_added}"
        arrival_ns = now_ns - (MAX_QUEUE_SECONDS + 1) * 1_000_000_000 if is_overdue else now_ns
        self.engine.add(
            self.engine.make_request(
                prompt, params, request_id=request_id, cache_salt=salt, priority=priority, client=client,
                arrival_ns=arrival_ns,
            )
        )  # fmt: skip
        if is_overdue:
            self.overdue.add(request_id)
        self.num_added += 1
        self.prompts = [*self.prompts[-7:], prompt]
        self.expected[request_id] = alone(prompt, params, min(total, self.capacity + 1))
        self.tokens[request_id] = []
        self.texts[request_id] = ""
        self.scored[request_id] = []
        self.expected_scores[request_id] = scores_of(prompt, params)
        self.check()

    def abort(self, index: int) -> None:
        live = sorted(set(self.expected) - self.aborted)
        if not live:
            return
        request_id = live[index % len(live)]
        self.engine.abort(request_id)
        self.aborted.add(request_id)
        assert request_id not in self.running(), "an aborted request holds a row"
        self.check()

    def expire(self, index: int) -> None:
        """Let the own deadline of a live request be over."""
        live = sorted(set(self.expected) - self.aborted)
        if not live:
            return
        request_id = live[index % len(live)]
        seq = self.engine._scheduler.get(request_id)
        if seq is not None:
            self.engine._deadlines.add(replace(seq.request, deadline_ns=0))
            self.expired.add(request_id)
            if request_id in self.running():
                self.seen.add("timeout of one that runs")

    def fail_next(self, error: Exception, *, in_submit: bool) -> None:
        self.runner.fail_next(error, in_submit=in_submit)

    def running(self) -> dict[str, tuple[int, ...]]:
        return {seq.request_id: tuple(seq.block_ids) for seq in self.engine._scheduler.running}

    def step(self) -> None:
        head = next(iter(self.running()), None)
        tail, before_tail = self._long_prefill()
        before = self._progress(head)
        output = self.engine.step()
        self._check_progress(head, before, output)
        now_running = self.engine._scheduler.running
        if tail is not None and now_running[-1:] == [tail] and now_running[-2:-1] not in ([], before_tail):
            self.seen.add("overtaking")
        self._take(output)
        assert not self.expired & set(self.expected), "a request outlived its deadline"
        self.expired.clear()
        self.check()

    def _long_prefill(self) -> tuple[Sequence | None, list[Sequence]]:
        """The running list's tail if its prefill is not over, and who stands before it."""
        scheduler = self.engine._scheduler
        for tail in scheduler.running[-1:]:
            if not tail.is_decoding and scheduler.num_scheduled(tail) < tail.num_tokens:
                return tail, scheduler.running[-2:-1]
        return None, []

    def _progress(self, request_id: str | None) -> int:
        scheduler = self.engine._scheduler
        seq = scheduler.get(request_id) if request_id else None
        return scheduler.num_scheduled(seq) + seq.num_computed + seq.num_tokens if seq else -1

    def _check_progress(self, head: str | None, before: int, output: StepOutput) -> None:
        """The oldest running sequence advances, or its last token is in flight: nothing can starve or livelock."""
        failed = output.record is not None and output.record.error is not None
        after = self._progress(head)
        if head is None or failed or after == -1 or after > before:
            self.head_waits = 0
            return
        self.head_waits = self.head_waits + 1 if head == self.last_head else 1
        self.last_head = head
        assert self.head_waits < self.shape.max_inflight, f"{head} did not advance in {self.head_waits} steps"

    def _take(self, output: StepOutput) -> None:
        failed = set()
        for delta in output.deltas:
            request_id = delta.request_id
            expected = self.expected[request_id]
            self.tokens[request_id] += delta.token_ids
            self.texts[request_id] += delta.text or ""
            scored, expected_scores = self.scored[request_id], self.expected_scores[request_id]
            scored += delta.prompt_logprobs
            assert scored == expected_scores[: len(scored)], request_id
            if self.tokens[request_id] or delta.finish_reason is FinishReason.LENGTH:
                assert len(scored) == len(expected_scores), request_id
            got = tuple(self.tokens[request_id])
            assert got == expected.token_ids[: len(got)], f"{request_id}: {got}, alone {expected.token_ids}"
            if delta.finish_reason is None:
                assert len(got) < len(expected.token_ids), f"{request_id} runs on after its last token"
                continue
            if delta.finish_reason is FinishReason.ERROR:
                assert delta.error
                failed.add(request_id)
            elif delta.finish_reason is FinishReason.ABORT:
                assert request_id in self.aborted
            elif delta.finish_reason is FinishReason.TIMEOUT:
                assert request_id in self.overdue | self.expired, request_id
                assert request_id in self.expired or not got, f"{request_id} had begun"
            else:
                ended = (delta.finish_reason, delta.stop_reason, got)
                assert ended == (expected.reason, expected.stop_reason, expected.token_ids), request_id
                if expected.text is not None:
                    assert self.texts[request_id] == expected.text, request_id
            if expected.text is not None and delta.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                whole = bytes(t for t in got if t != EOS).decode()
                shown = self.texts[request_id]
                assert whole.startswith(shown) or bytes(got).decode().startswith(shown), request_id
            self.seen.add(delta.finish_reason.value)
            if delta.finish_reason is FinishReason.LENGTH and not got:
                self.seen.add("scored only")
            self.num_finished += 1
            for known in (self.expected, self.tokens, self.texts, self.scored, self.expected_scores):
                del known[request_id]
            self.aborted.discard(request_id)
        assert {record.request_id for record in output.requests} == {
            delta.request_id for delta in output.deltas if delta.finish_reason is not None
        }
        self._take_record(output, failed)

    def _take_record(self, output: StepOutput, failed: set[str]) -> None:
        record = output.record
        if record is None:
            assert not failed
            return
        assert bool(record.error) == ("fail" in (record.error or "")), record.error
        if record.error:
            self.seen.add("failed step")
            assert failed <= {request_id for request_id, _ in record.rows}, (
                "a request failed that was not in the step"
            )
        else:
            assert not failed
        if record.preempted:
            self.seen.add("preemption")
        if record.prefix_hits:
            self.seen.add("prefix hit")
        if record.num_blocks_back:
            self.seen.add("host tier hit")
            hits = sum(num_tokens for _, num_tokens in record.prefix_hits)
            assert record.num_blocks_back * self.shape.block_size <= hits
        assert record.num_accepted_tokens <= record.num_draft_tokens < max(1, record.num_decode_tokens)
        if record.num_accepted_tokens:
            self.seen.add("right guess")
        if record.num_accepted_tokens < record.num_draft_tokens:
            self.seen.add("wrong guess")
        drafting = self.runner.plans[-1].drafting if self.runner.plans else None
        if drafting is not None:
            self.seen.add("draft model" if drafting.num_guesses.all() else "draft model behind")
        if drafting is not None and drafting.start.any():
            self.seen.add("draft model goes on")
        if record.num_prefill_tokens and record.num_decode_tokens:
            self.seen.add("mixed step")
        assert record.num_prefill_tokens + record.num_decode_tokens == sum(n for _, n in record.rows)
        assert sum(n for _, n in record.rows) <= self.shape.max_batched_tokens
        for event in record.block_events:
            if event.kind is BlockEventKind.RELEASE:
                del self.owners[event.request_id]
            elif event.kind is BlockEventKind.PUBLISH:
                assert not self.published & set(event.block_ids)
                self.published |= set(event.block_ids)
            else:
                self.owners.setdefault(event.request_id, []).extend(event.block_ids)
                if event.kind is BlockEventKind.ACQUIRE:
                    self.published -= set(event.block_ids)
        replayed = {request_id: tuple(table) for request_id, table in self.owners.items()}
        assert replayed == self.running(), "the records tell of other block tables"
        assert self.published == self.engine._scheduler.blocks.pool.published_ids()
        if record.keyframe is not None:
            self.seen.add("keyframe")
            assert record.keyframe.owners == replayed
            assert record.keyframe.published == self.published

    def check(self) -> None:
        assert not self.runner.violations, self.runner.violations
        self.engine.check_integrity()

    def drain(self) -> None:
        """Everything that was asked for ends, within as many steps as it can need at one token a step."""
        limit = 50 + 4 * (MAX_MODEL_LEN + 4) * (len(self.expected) + 2)
        for _ in range(limit):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, f"{sorted(self.expected)} still live after {limit} steps"
        assert not self.expected
        stats = self.engine.stats()
        assert stats.num_free_blocks == self.shape.num_blocks, "blocks are lost"
        assert stats.num_cached_host_blocks <= stats.num_host_blocks == self.shape.num_host_blocks
        assert stats.num_running == stats.num_waiting == 0
        assert sum(stats.finished.values()) == self.num_added == self.num_finished


SHAPES = st.builds(
    Shape,
    num_blocks=st.integers(2, 14),
    num_host_blocks=st.sampled_from([0, 0, 1, 2, 5, 20]),
    num_guesses=st.sampled_from([0, 0, 1, 3]),
    has_draft_model=st.booleans(),
    block_size=st.sampled_from([1, 2, 4]),
    max_batched_tokens=st.integers(1, 16),
    max_num_seqs=st.integers(1, 5),
    max_inflight=st.integers(1, 3),
    enable_prefix_cache=st.sampled_from([True, True, True, False]),
).filter(lambda shape: shape.enable_prefix_cache or not shape.num_host_blocks)
TOKENS = st.integers(0, 3)
STOP_TEXTS = st.lists(st.text("\x00\x01\x02\x03\x04\x05", min_size=1, max_size=2), max_size=2)


class EngineMachine(RuleBasedStateMachine):
    """Any order of adding, stepping, aborting, expiring and failing."""

    harness: Harness

    @initialize(shape=SHAPES)
    def start(self, shape: Shape) -> None:
        self.harness = Harness(shape)

    @rule(
        prompt=st.lists(TOKENS, min_size=1, max_size=24),
        reuse=st.none() | st.tuples(st.integers(0, 7), st.integers(1, 24)),
        max_tokens=st.none() | st.integers(0, 12),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        stop=STOP_TEXTS,
        include=st.booleans(),
        salt=st.sampled_from(["", "", "", "other"]),
        score=st.sampled_from([None, None, None, 0, 2]),
        score_from=st.sampled_from([0, 0, 1, 2, 7]),
        priority=st.sampled_from([0, 0, -1, 1]),
        client=st.sampled_from("ab"),
        is_overdue=st.sampled_from([False, False, False, True]),
    )
    def add(
        self,
        prompt,
        reuse,
        max_tokens,
        min_tokens,
        ignore_eos,
        stop_token_ids,
        stop,
        include,
        salt,
        score,
        score_from,
        priority,
        client,
        is_overdue,
    ) -> None:
        if reuse is not None and self.harness.prompts:
            old = self.harness.prompts[reuse[0] % len(self.harness.prompts)]
            prompt = (old[: reuse[1]] + prompt)[:24]
        if max_tokens == 0 and score is None:
            max_tokens = 1
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens if max_tokens is None else min(min_tokens, max_tokens),
            ignore_eos=ignore_eos,
            stop_token_ids=tuple(stop_token_ids),
            stop=tuple(stop),
            include_stop_str_in_output=include,
            prompt_logprobs=score,
            logprob_start_len=score_from if score is not None else 0,
        )
        self.harness.add(prompt, params, salt, priority, client, is_overdue=is_overdue)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @rule(index=st.integers(0, 9))
    def abort(self, index: int) -> None:
        self.harness.abort(index)

    @rule(index=st.integers(0, 9))
    def expire(self, index: int) -> None:
        self.harness.expire(index)

    @precondition(lambda self: self.harness.engine.has_work)
    @rule(in_submit=st.booleans(), memory=st.booleans())
    def fail(self, in_submit: bool, memory: bool) -> None:
        error = OutOfMemoryError("no memory left") if memory else RuntimeError("a kernel raised")
        self.harness.fail_next(error, in_submit=in_submit)

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.drain()


EngineMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestEngineMachine = EngineMachine.TestCase


def random_params(rng: random.Random) -> SamplingParams:
    score = rng.choice([0, 2]) if rng.random() < 0.2 else None
    max_tokens = rng.choice([None, *range(score is None, 13)])
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.randint(0, 3 if max_tokens is None else min(3, max_tokens)),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=tuple(rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 1]))),
        stop=tuple(
            "".join(rng.choices("\x00\x01\x02\x03\x04", k=2)) for _ in range(rng.choice([0, 0, 0, 2]))
        ),
        include_stop_str_in_output=rng.random() < 0.3,
        prompt_logprobs=score,
        logprob_start_len=0 if score is None else rng.choice([0, 0, 1, 5]),
    )


def random_prompt(rng: random.Random, known: list[list[int]]) -> list[int]:
    """Half of the prompts continue the beginning of an earlier one."""
    ending = [rng.randint(0, 3) for _ in range(rng.randint(1, 16))]
    if known and rng.random() < 0.6:
        old = rng.choice(known)
        return (old[: rng.randint(1, len(old))] + ending[: rng.randint(0, 4)])[:30]
    if rng.random() < 0.2:
        return [rng.randint(0, 3) for _ in range(rng.randint(20, 36))]
    return ending


def drive(
    seed: int,
    num_operations: int,
    operations_per_engine: int = 400,
    *,
    with_tier: bool = False,
    with_guesses: bool = False,
) -> set[str]:
    """`num_operations` random operations, over engines of random shapes; returns what has happened on the way."""
    rng = random.Random(seed)
    seen: set[str] = set()
    done = 0
    while done < num_operations:
        harness = Harness(
            Shape(
                num_blocks=rng.randint(2, 16),
                block_size=rng.choice([1, 2, 4]),
                max_batched_tokens=rng.randint(1, 20),
                max_num_seqs=rng.randint(1, 6),
                max_inflight=rng.randint(1, 3),
                enable_prefix_cache=rng.random() < 0.85 or with_tier,
                num_host_blocks=rng.randint(1, 24) if with_tier else 0,
                num_guesses=rng.randint(1, 4) if with_guesses else 0,
                has_draft_model=with_guesses and rng.random() < 0.5,
            )
        )
        for _ in range(operations_per_engine):
            done += 1
            roll = rng.random()
            if roll < 0.22:
                harness.add(
                    random_prompt(rng, harness.prompts),
                    random_params(rng),
                    rng.choice(["", "", "other"]),
                    rng.choice([0, 0, -1, 1]),
                    rng.choice("ab"),
                    is_overdue=rng.random() < 0.05,
                )
            elif roll < 0.26:
                harness.abort(rng.randrange(16))
            elif roll < 0.265:
                harness.fail_next(RuntimeError("a kernel raised"), in_submit=rng.random() < 0.5)
            elif roll < 0.27:
                harness.expire(rng.randrange(16))
            else:
                harness.step()
        harness.drain()
        seen |= harness.seen
    return seen


EVERYTHING = {
    "stop",
    "length",
    "abort",
    "error",
    "failed step",
    "preemption",
    "prefix hit",
    "mixed step",
    "keyframe",
    "scored only",
    "timeout",
    "timeout of one that runs",
    "refused",
    "overtaking",
}


WITH_TIER_AND_GUESSES = {
    "host tier hit", "right guess", "wrong guess", "draft model", "draft model behind", "draft model goes on",
}  # fmt: skip


def test_random_operations_reach_every_kind_of_event() -> None:
    assert drive(seed=1, num_operations=8_000) == EVERYTHING


def test_random_operations_with_a_host_tier() -> None:
    assert drive(seed=2, num_operations=10_000, with_tier=True) == {*EVERYTHING, "host tier hit"}


def test_random_operations_with_speculation() -> None:
    seen = drive(seed=3, num_operations=8_000, with_tier=True, with_guesses=True)
    assert seen == {*EVERYTHING, *WITH_TIER_AND_GUESSES}


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_operations_with_speculation() -> None:
    seed = int(os.environ.get("QUIRE_PROOF_SEED", time.time_ns() % 2**32))
    print(f"QUIRE_PROOF_SEED={seed}")
    assert drive(seed, 100_000, with_tier=True, with_guesses=True) == {*EVERYTHING, *WITH_TIER_AND_GUESSES}


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_operations_with_a_host_tier() -> None:
    seed = int(os.environ.get("QUIRE_PROOF_SEED", time.time_ns() % 2**32))
    print(f"QUIRE_PROOF_SEED={seed}")
    assert drive(seed, 100_000, with_tier=True) == {*EVERYTHING, "host tier hit"}


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_million_operations_keep_every_promise() -> None:
    seed = int(os.environ.get("QUIRE_PROOF_SEED", time.time_ns() % 2**32))
    num_operations = int(os.environ.get("QUIRE_PROOF_OPERATIONS", 1_000_000))
    print(f"QUIRE_PROOF_SEED={seed} QUIRE_PROOF_OPERATIONS={num_operations}")
    assert drive(seed, num_operations) == EVERYTHING
