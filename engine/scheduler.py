"""Scheduler: decides what each step computes, and takes in what it chose.

``plan()`` makes the next StepPlan while earlier steps may still be in flight; ``commit(result)`` takes in the oldest step's
result. One token budget a step, for running sequences first, then for waiting ones; prefill is chunked and mixed with
decode. A sequence computes its tokens in order: first chunks of what is known of it, then one token a step, each planned
while the step before it may still be choosing it. Out of blocks, the tail of the running list is preempted and recomputed
later; the head always gets its blocks, so that every sequence finishes.

A running sequence whose prefill is not over is the tail, which took what was left of a step's budget, or the one before it, which
overtakes a long prefill (``engine.long_prefill``). All others decode, never more of them than the budget, as each got a token of it
when it was admitted. What each of their steps changes stands in columns by row, so that a step changes all rows at once; Python
visits a row only where something happens: a block begins or is full, a token may end it.

Boundary: pure Python over counts and ids. No model, no clock, no text (stop texts are the engine's). What can never fit is
refused before it comes here (``engine.admission``). Costs O(scheduled rows), whatever the contexts' lengths.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

import numpy as np

from engine.cache.sequence_blocks import Match, SequenceBlocks
from engine.decode_rows import DecodeRows, without
from engine.long_prefill import LongPrefill
from engine.long_prefill import find as find_long_prefill
from engine.lora_queue import LoraQueue
from engine.plan import RowAdmission, StepPlan, StepResult
from engine.plan_builder import PlanBuilder
from engine.planned_step import Chunk, Commit, Finish, PlannedStep, PooledPart, PromptLogprobs
from engine.request import FinishReason, Request, Sequence, SequenceStatus
from engine.request_queue import RequestQueue
from engine.speculation import Speculator

MAX_DEFERRED = 16  # waiting sequences passed by in one plan: bounds what a plan may cost


class Scheduler:
    """Owner of all sequences. Not thread-safe: one thread plans and commits."""

    def __init__(
        self,
        blocks: SequenceBlocks,
        *,
        max_batched_tokens: int,
        max_num_seqs: int,
        eos_token_ids: frozenset[int],
        max_loras: int = 1,
        client_weights: Mapping[str, float] | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.blocks = blocks
        self.max_batched_tokens = max_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.waiting = RequestQueue(client_weights)
        self.running: list[Sequence] = []  # in order of admission: the tail is preempted first
        self.inflight: deque[PlannedStep] = deque()
        self.num_preemptions = 0
        self.loras = LoraQueue(max_loras)
        self._live: dict[str, Sequence] = {}
        self._eos = eos_token_ids
        self._stop_ids = set(eos_token_ids)  # every id that may stop some sequence
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._finished_rows: list[int] = []  # rows given back since the last plan
        # By row: tokens that have their KV or get it by a step in flight; tokens that the sequence may reach.
        self._num_scheduled = np.zeros(max_num_seqs, np.int32)
        self._max_total_tokens = np.zeros(max_num_seqs, np.int32)
        self._decode_rows: DecodeRows | None = None  # None: somebody came or went
        self._beginning: list[int] = []  # those of them that need a block in the next step
        self._until_last = 0  # steps until the first of them chooses its last token
        self._preempted: list[Sequence] = []  # since the last plan: one that computes nothing tells of nobody
        self._next_step_id = 0
        # (request_id, free blocks) when the queue's head did not fit.
        self._blocked: tuple[str, int] | None = None
        self._builder = PlanBuilder(max_num_seqs)
        self._speculator = speculator
        self._block_mask = blocks.block_size - 1  # block sizes are powers of two

    # ── in and out ──────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        request_id = seq.request_id
        assert request_id not in self._live, f"request {request_id} is already here"
        self._live[request_id] = seq
        self.waiting.add(seq)
        self._stop_ids.update(seq.request.params.stop_token_ids)
        if seq.request.lora is not None:
            self.loras.begin(seq.request.lora.lora_id)

    def get(self, request_id: str) -> Sequence | None:
        """The live sequence of that request."""
        return self._live.get(request_id)

    def request(self, request_id: str) -> Request | None:
        """The live request of that id."""
        seq = self._live.get(request_id)
        return None if seq is None else seq.request

    def has_begun(self, request: Request) -> bool:
        """Whether a live request runs, or ran before it was put back."""
        seq = self._live[request.request_id]
        return seq.status is not SequenceStatus.WAITING or seq.epoch > 0

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a live sequence now: its blocks and row are free for the next plan, results in flight are dropped."""
        self.waiting.end(seq)
        if seq.status is SequenceStatus.WAITING:
            self._blocked = None
        else:
            self.running.remove(seq)
            self._leave_row(seq)
        self._end(seq, reason)

    def abort(self, request_id: str) -> Sequence | None:
        """End a request because its caller went away. None if it is not live (any more)."""
        seq = self._live.get(request_id)
        if seq is not None:
            self.finish(seq, FinishReason.ABORT)
        return seq

    @property
    def has_work(self) -> bool:
        return bool(self._live or self.inflight)

    def sequences(self) -> list[Sequence]:
        """All live sequences: running ones, then waiting ones."""
        return [*self.running, *self.waiting.in_order()]

    def num_scheduled(self, seq: Sequence) -> int:
        """Tokens of `seq` that have their KV, or get it by a step in flight."""
        return int(self._num_scheduled[seq.row]) if seq.row >= 0 else 0

    def take_step_id(self) -> int:
        """The next step's number."""
        step_id = self._next_step_id
        self._next_step_id += 1
        return step_id

    # ── plan ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed before a step in flight is committed."""
        step = PlannedStep(self._next_step_id, preempted=self._preempted)
        num_preempted = len(step.preempted)
        num_guessing = self._plan_guesses(step) if self._speculator is not None else 0
        budget = self._plan_decoding(step) - num_guessing
        long = self._long_prefill(budget)
        num_kept = budget if long is None else long.num_kept
        left = self._plan_prefill(step, num_kept, -1 if long is None else -2)
        admitted: list[RowAdmission] = []
        if left > 0 and self.waiting and len(step.preempted) == num_preempted:
            admitted = self._plan_waiting(step, left, long)
            left -= sum(chunk.num_tokens for chunk in step.chunks[len(step.chunks) - len(admitted) :])
        if long is not None and long.seq.status is SequenceStatus.RUNNING:
            self._plan_prefill(step, budget - num_kept + left, -1)
        if not len(step.decoding) and not step.chunks:
            assert self.inflight or not self._live, (
                "live sequences, nothing in flight, and nothing can be planned"
            )
            return None
        self._next_step_id += 1
        self._preempted = []
        if self._speculator is not None:
            step.drafting = self._speculator.drafting(step)
        step.copies = self.blocks.take_copies()
        self.inflight.append(step)
        finished_rows, self._finished_rows = self._finished_rows, []
        return self._builder.build(step, admitted, finished_rows)

    def _plan_guesses(self, step: PlannedStep) -> int:
        """Let sequences that decode compute guesses too, where budget and blocks are left for what may be in vain.

        Returns the tokens that these sequences compute. They are not among the decoding ones until the step is committed: how
        far each of them comes is not known before. For the same reason nothing is guessed while a step is in flight.
        """
        speculator, pool = self._speculator, self.blocks.pool
        decoding = [seq for seq in self.running if seq.is_decoding]
        if speculator is None or self.inflight:
            return 0
        if not speculator.begin(len(decoding), self.max_batched_tokens):
            return 0
        # Of what the decoding ones leave, half is for those that wait.
        spare = (self.max_batched_tokens - len(decoding)) // 2
        num_tokens = 0
        for seq in decoding:
            start = self.num_scheduled(seq)
            limit = min(spare, seq.max_total_tokens - len(seq.token_ids) - 1)
            if limit < 1 or start < seq.num_prompt_tokens:
                continue
            drafts = speculator.guess(seq, limit)
            end = start + 1 + len(drafts)
            if not drafts or self.blocks.num_missing(seq, end) > pool.num_free - len(decoding):
                continue
            spare -= len(drafts)
            num_tokens += end - start
            fresh = self.blocks.grow(seq, end)
            self._num_scheduled[seq.row] = end
            seq.is_decoding = False
            step.chunks.append(Chunk(seq, start, end - start, True, fresh, drafts))
            self._decode_rows = None
        return num_tokens

    def _plan_decoding(self, step: PlannedStep) -> int:
        """Give each sequence that decodes one token, in order of admission; returns the budget left."""
        decoding = self._decoding()
        for i in self._beginning:
            seq = decoding.sequences[i]
            if not seq.is_decoding:
                break  # preempted for one before it, and so are all behind it
            if self.blocks.num_missing(seq, self.num_scheduled(seq) + 1) <= 0:
                continue  # it kept the block of a wrong guess
            if not self.blocks.pool.num_free and not self._free_up(1, seq, step):
                break
            step.growth.append((i, [self.blocks.append_block(seq)]))
        decoding = self._decoding()  # without those preempted, which were the tail
        start = self._num_scheduled[decoding.index]
        end = start + 1
        self._num_scheduled[decoding.index] = end
        # Who fills a block in this step begins one in the next.
        step.full = self._beginning = ((end & self._block_mask) == 0).nonzero()[0].tolist()
        step.decoding, step.start = decoding, start
        step.num_decode_tokens = len(decoding) + sum(chunk.num_tokens for chunk in step.chunks)
        for seq, at in zip(decoding.sequences[-2:], start[-2:].tolist(), strict=True):
            if at < seq.num_prompt_tokens:
                step.num_decode_tokens -= 1  # the last token of a prompt whose prefill left just this one
        self._until_last -= 1
        if not self._until_last:
            step.last = np.flatnonzero(end + 1 == self._max_total_tokens[decoding.index]).tolist()
            for i in step.last:
                decoding.sequences[i].is_decoding = False
            self._decode_rows = None
        return self.max_batched_tokens - len(decoding)

    def _decoding(self) -> DecodeRows:
        """The sequences that decode."""
        if self._decode_rows is None:
            self._decode_rows = rows = DecodeRows([seq for seq in self.running if seq.is_decoding])
            num_scheduled = self._num_scheduled[rows.index]
            left = self._max_total_tokens[rows.index] - num_scheduled
            self._beginning = np.flatnonzero((num_scheduled & self._block_mask) == 0).tolist()
            self._until_last = int(left.min()) - 1 if len(rows) else 0
        return self._decode_rows

    def _long_prefill(self, budget: int) -> LongPrefill | None:
        """The prefill of the tail, if others may go before it in this step."""
        last = self.running[-2:]
        if not last or last[-1].is_decoding:
            return None
        lefts = [0 if seq.is_decoding else len(seq.token_ids) - self.num_scheduled(seq) for seq in last]
        return find_long_prefill(last, lefts, budget, somebody_waits=bool(self.waiting))

    def _plan_prefill(self, step: PlannedStep, budget: int, place: int) -> int:
        """Go on with the prefill at this place of the running list, if it has not ended; returns the budget left."""
        if not budget or len(self.running) < -place or self.running[place].is_decoding:
            return budget
        seq = self.running[place]
        start = self.num_scheduled(seq)
        num_tokens = min(len(seq.token_ids) - start, budget)
        if num_tokens <= 0:
            return budget  # its last token is being chosen
        if not self._free_up(self.blocks.num_missing(seq, start + num_tokens), seq, step):
            return budget
        fresh = self.blocks.grow(seq, start + num_tokens)
        step.chunks.append(self._schedule_chunk(seq, start, num_tokens, fresh))
        return budget - num_tokens

    def _schedule_chunk(self, seq: Sequence, start: int, num_tokens: int, fresh: list[int]) -> Chunk:
        end = start + num_tokens
        # One that is only scored has its last token.
        samples = end == len(seq.token_ids) and end < seq.max_total_tokens
        self._num_scheduled[seq.row] = end
        if end + 1 >= len(seq.token_ids):
            seq.is_decoding = end + 1 < seq.max_total_tokens
            self._decode_rows = None
        return Chunk(seq, start, num_tokens, samples, fresh)

    def _free_up(self, num_blocks: int, seq: Sequence, step: PlannedStep) -> bool:
        """Preempt from the tail until `num_blocks` are free for `seq`. False: `seq` itself had to go."""
        while self.blocks.pool.num_free < num_blocks:
            victim = self.running[-1]
            self._preempt(victim)
            step.preempted.append(victim)
            if victim is seq:
                return False
        return True

    def _plan_waiting(self, step: PlannedStep, budget: int, long: LongPrefill | None) -> list[RowAdmission]:
        """Admit waiting sequences while rows, blocks and budget last; beside a long prefill only those that it lets pass.

        A sequence whose next block a running one is about to publish stays where it is and is passed by: waiting a step
        or two costs less than computing the same prefix again. So is one whose adapter has to wait for a slot.
        """
        admitted: list[RowAdmission] = []
        deferred = 0
        if not self._free_rows or self._is_blocked():
            return admitted
        self.loras.forget_claims()
        for seq in self.waiting.in_order():
            if not budget or not self._free_rows or not self.blocks.pool.num_free:
                break
            lora = seq.request.lora
            has_slot = lora is None or self.loras.admits(lora.lora_id)
            match = Match([], []) if not has_slot or self.blocks.awaits(seq) else self.blocks.match(seq)
            num_tokens = len(seq.token_ids) - len(match) * self.blocks.block_size
            must_wait = long is not None and not long.lets_pass(seq, num_tokens, budget)
            if must_wait or not has_slot or self.blocks.awaits(seq) or self.blocks.look_out(seq, len(match)):
                deferred += 1
                if deferred > MAX_DEFERRED:
                    break
                continue
            if not self._fits(seq, match.blocks, long):
                if long is None:
                    self._blocked = (seq.request_id, self.blocks.pool.num_free)
                break
            admitted.append(self._admit(seq, match, step, budget, long))
            budget -= step.chunks[-1].num_tokens
        return admitted

    def _is_blocked(self) -> bool:
        """Whether the queue's head is known not to fit: asking again before blocks came free would cost its whole match."""
        if self._blocked is None:
            return False
        request_id, num_free = self._blocked
        if (
            self.waiting.head.request_id == request_id
            and self.blocks.pool.num_free <= num_free
            and self.running
        ):
            return True
        self._blocked = None
        return False

    def _fits(self, seq: Sequence, matched: list[int], long: LongPrefill | None) -> bool:
        """Whether the free blocks hold all tokens known of `seq`: a prefill that starts should also end, and so should `long`."""
        pool = self.blocks.pool
        missing = self.blocks.num_missing(seq, len(seq.token_ids)) - len(matched)
        if long is not None:
            missing += self.blocks.num_missing(long.seq, len(long.seq.token_ids))
        return missing <= pool.num_free - pool.count_free(matched)

    def _admit(
        self, seq: Sequence, match: Match, step: PlannedStep, budget: int, long: LongPrefill | None
    ) -> RowAdmission:
        """Give `seq` a row, its matched blocks and its first chunk."""
        num_cached = len(match) * self.blocks.block_size
        tokens = list(seq.token_ids)
        num_tokens = min(len(tokens) - num_cached, budget)
        self.blocks.admit(seq, match, num_cached + num_tokens)
        self.waiting.admit(seq)
        self.running.insert(len(self.running) - (long is not None), seq)
        seq.status = SequenceStatus.RUNNING
        seq.row = self._free_rows.pop()
        # What comes from the host is there, and published, when the step is committed.
        seq.num_computed = len(match.blocks) * self.blocks.block_size
        self._max_total_tokens[seq.row] = seq.max_total_tokens
        if not seq.epoch:
            seq.num_cached_tokens = num_cached
        step.admitted.append(seq)
        if num_cached:
            step.prefix_hits.append((seq.request_id, num_cached))
        step.chunks.append(self._schedule_chunk(seq, num_cached, num_tokens, []))
        request = seq.request
        return RowAdmission(
            row=seq.row,
            request_id=request.request_id,
            token_ids=tokens,
            num_prompt_tokens=seq.num_prompt_tokens,
            num_computed=num_cached,
            block_ids=(tuple(seq.block_ids),),
            params=request.params,
            seed=request.seed,
            lora_slot=-1 if request.lora is None else self.loras.enter(request.lora.lora_id),
            lora_id=0 if request.lora is None else request.lora.lora_id,
            grammar=request.grammar,
        )

    # ── commit ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, result: StepResult) -> Commit:
        """Take in the oldest step in flight: its tokens become known, its full blocks matchable.

        Rows whose sequence was finished or preempted meanwhile are dropped. Sequences that end here have given back
        their blocks and rows when this returns.
        """
        step = self.inflight.popleft()
        assert result.step_id == step.step_id, f"result of step {result.step_id}, expected {step.step_id}"
        num_decoding, token_ids = len(step.decoding), result.token_ids
        num_choices = sum([chunk.num_choices for chunk in step.chunks])
        expected = num_decoding + num_choices
        assert len(token_ids) == expected, f"{len(token_ids)} tokens for {expected} choices"
        self.blocks.release_copies(step.copies)
        commit = Commit(step)
        for chunk in step.chunks if step.drafting is not None else ():
            if chunk.drafts and chunk.seq not in step.dropped:
                chunk.drafts = result.guesses[chunk.seq.row]
        self._commit_decoding(commit, token_ids[:num_decoding] if num_choices else token_ids)
        if step.chunks:
            self._commit_chunks(commit, token_ids[num_decoding:])
        if self._speculator is not None:
            self._speculator.take_in(step)
        if result.logprobs:
            sampled = step.sampling()
            for j, entry in result.logprobs.items():
                commit.logprobs.setdefault(sampled[j].request_id, []).append(entry)
        if result.prompt_logprobs:
            self._commit_prompt_logprobs(commit, result)
        for i, values in result.pooled.items():  # such rows never decode
            chunk = step.chunks[i - num_decoding]
            if chunk.seq not in step.dropped:
                commit.pooled.append(PooledPart(chunk.seq, chunk.start, values))
        return commit

    def _commit_decoding(self, commit: Commit, token_ids: list[int]) -> None:
        step = commit.step
        decoding, dropped = step.decoding, step.dropped
        commit.decoding, commit.token_ids = decoding, token_ids
        if dropped:
            gone = [i for i, seq in enumerate(decoding.sequences) if seq in dropped]
            commit.decoding, commit.token_ids = decoding.without(gone), without(token_ids, gone)
        commit.sequences = commit.decoding.sequences
        for known, token in zip(commit.decoding.token_ids, commit.token_ids, strict=True):
            known.append(token)
        full = [decoding.sequences[i] for i in step.full if decoding.sequences[i] not in dropped]
        for seq in full:
            seq.num_computed = len(seq.token_ids) - 1
        self.blocks.publish_last(full)
        # Rows that may end here are few; whether there are any, a set tells without a loop.
        may_end = set(step.last)
        if not self._stop_ids.isdisjoint(token_ids):
            may_end.update(i for i, token in enumerate(token_ids) if token in self._stop_ids)
        for i in sorted(may_end):
            if decoding.sequences[i] not in dropped:
                self._finish_if_over(commit, decoding.sequences[i], token_ids[i])

    def _commit_chunks(self, commit: Commit, token_ids: list[int]) -> None:
        step = commit.step
        commit.sequences, commit.token_ids = list(commit.sequences), list(commit.token_ids)
        tokens = iter(token_ids)
        for chunk in step.chunks:
            seq, end = chunk.seq, chunk.start + chunk.num_tokens
            sampled = [next(tokens) for _ in range(chunk.num_choices)]
            if seq in step.dropped:
                continue
            if chunk.drafts:
                self._commit_guesses(commit, chunk, sampled)
                continue
            self.blocks.publish(seq, seq.num_computed, end)
            seq.num_computed = end
            for token in sampled:
                seq.token_ids.append(token)
                commit.sequences.append(seq)
                commit.token_ids.append(token)
                self._finish_if_over(commit, seq, token)
            if end == seq.max_total_tokens:
                self.finish(seq, FinishReason.LENGTH)
                commit.finished.append(Finish(seq, FinishReason.LENGTH, has_token=False))

    def _commit_guesses(self, commit: Commit, chunk: Chunk, sampled: list[int]) -> None:
        """Take in what was chosen behind the last known token and behind each guess, up to the first wrong guess."""
        seq = chunk.seq
        num_right = 0
        while num_right < len(chunk.drafts) and chunk.drafts[num_right] == sampled[num_right]:
            num_right += 1
        assert self._speculator is not None, "guesses without a speculator"
        self._speculator.count(seq, len(chunk.drafts), num_right)
        chunk.num_right = num_right
        commit.num_accepted_tokens += num_right
        self._num_scheduled[seq.row] = chunk.start + 1 + num_right
        seq.is_decoding = True
        self._decode_rows = None
        for token in sampled[: num_right + 1]:
            self.blocks.publish(seq, seq.num_computed, len(seq.token_ids))
            seq.num_computed = len(seq.token_ids)
            seq.token_ids.append(token)
            commit.sequences.append(seq)
            commit.token_ids.append(token)
            self._finish_if_over(commit, seq, token)
            if seq.status is SequenceStatus.FINISHED:
                break

    def _commit_prompt_logprobs(self, commit: Commit, result: StepResult) -> None:
        step = commit.step
        rows = list(zip(step.decoding.sequences, step.start.tolist(), strict=True))
        rows += [(chunk.seq, chunk.start) for chunk in step.chunks]
        for i, entries in result.prompt_logprobs.items():
            seq, start = rows[i]
            if seq not in step.dropped:
                first = max(start + 1, seq.request.params.logprob_start_len)
                commit.prompt_logprobs.append(PromptLogprobs(seq, first, entries))

    def _finish_if_over(self, commit: Commit, seq: Sequence, token: int) -> None:
        """End `seq` if its newest token stops it or is its last."""
        num_tokens = len(seq.token_ids)
        params = seq.request.params
        reason: FinishReason | None = None
        stop_reason: int | None = None
        if num_tokens - seq.num_prompt_tokens >= params.min_tokens:
            if token in params.stop_token_ids:
                reason, stop_reason = FinishReason.STOP, token
            elif token in self._eos and not params.ignore_eos:
                reason = FinishReason.STOP
        if reason is None and num_tokens == seq.max_total_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self.finish(seq, reason)
            commit.finished.append(Finish(seq, reason, stop_reason))

    def fail(self, step: PlannedStep) -> list[Sequence]:
        """Forget all steps in flight after `step` failed: its sequences end with ERROR and are returned.

        The other running ones return to the front of the queue in their order; the runner must forget all rows too.
        """
        lost = [seq for seq in step.sequences() if seq not in step.dropped]
        self.blocks.withdraw_copies([lost_step.copies for lost_step in self.inflight])
        self.inflight.clear()
        for seq in lost:
            self.finish(seq, FinishReason.ERROR)
        while self.running:
            self._requeue(self.running[-1])
        self._finished_rows.clear()
        return lost

    # ── leaving ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _preempt(self, seq: Sequence) -> None:
        self._requeue(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1

    def _requeue(self, seq: Sequence) -> None:
        """Take the tail of the running list back to the front of the queue; its tokens are recomputed later."""
        assert self.running[-1] is seq, "only the tail of the running list may be put back"
        self.running.pop()
        self._leave_row(seq)
        self.blocks.release(seq)
        seq.num_computed = 0
        seq.epoch += 1
        seq.status = SequenceStatus.WAITING
        self.waiting.put_back(seq)

    def _leave_row(self, seq: Sequence) -> None:
        if seq.request.lora is not None:
            self.loras.leave(seq.request.lora.lora_id)
        self._free_rows.append(seq.row)
        self._finished_rows.append(seq.row)
        seq.row = -1
        seq.is_decoding = False
        self._decode_rows = None
        for step in self.inflight:
            step.dropped.add(seq)

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        self.blocks.release(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason
        del self._live[seq.request_id]
        if self._speculator is not None:
            self._speculator.forget(seq)
        if seq.request.lora is not None:
            self.loras.end(seq.request.lora.lora_id)

    # ── proof ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def check_integrity(self) -> None:
        """Prove that rows, blocks, tokens and queues agree. O(blocks + live tokens).

        Raises:
            AssertionError: naming what does not hold.
        """
        refs: Counter[int] = Counter()
        for seq in self.running:
            refs.update(seq.block_ids)
            self._check_running(seq)
        self.waiting.check_integrity()
        for seq in self.waiting.in_order():
            request_id = seq.request_id
            assert seq.status is SequenceStatus.WAITING, f"{request_id} waits as {seq.status}"
            assert seq.row == -1, f"{request_id} waits with row {seq.row}"
            assert not seq.block_ids, f"{request_id} waits with blocks"
            assert not seq.is_decoding, f"{request_id} waits and decodes"
        num_decoding = sum(seq.is_decoding for seq in self.running)
        assert num_decoding <= self.max_batched_tokens, f"{num_decoding} decode, more than a step may compute"
        self.loras.check_integrity(_count_loras(self.sequences()), _count_loras(self.running))
        self.blocks.pool.check_integrity(refs)
        self.blocks.check_integrity(self.running)
        rows = sorted([*self._free_rows, *(seq.row for seq in self.running)])
        assert rows == list(range(self.max_num_seqs)), f"rows are lost or given twice: {rows}"
        live = {seq.request_id for seq in self.sequences()}
        assert live == set(self._live), f"live {set(self._live)} but queued {live}"

    def _check_running(self, seq: Sequence) -> None:
        name, size = seq.request_id, self.blocks.block_size
        assert seq.status is SequenceStatus.RUNNING, f"{name} runs as {seq.status}"
        num_tokens, num_scheduled = len(seq.token_ids), self.num_scheduled(seq)
        most = max(seq.num_prompt_tokens, seq.max_total_tokens - 1)  # the last output token is not computed
        assert 0 <= seq.num_computed <= num_scheduled <= most, f"{name}: counts"
        assert seq.num_computed < num_tokens <= seq.max_total_tokens, f"{name}: {num_tokens} tokens"
        most = num_scheduled + (self._speculator.num_tokens if self._speculator is not None else 0)
        assert -(-num_scheduled // size) <= len(seq.block_ids) <= -(-most // size), (
            f"{name}: {len(seq.block_ids)} blocks"
        )
        num_choosing = (
            num_scheduled + 1 - num_tokens
        )  # steps in flight that choose a token; negative in a prefill
        guessed = [len(chunk.drafts) for step in self.inflight for chunk in step.chunks if chunk.seq is seq]
        assert num_choosing <= len(self.inflight) + sum(guessed), (
            f"{name}: {num_choosing} tokens in {len(self.inflight)} steps"
        )
        is_decoding = num_choosing >= 0 and num_scheduled + 1 < seq.max_total_tokens and not any(guessed)
        assert seq.is_decoding == is_decoding, f"{name}: decodes is {seq.is_decoding} at {num_scheduled}"
        if num_choosing < 0 and seq is not self.running[-1]:
            tail = self.running[-1]
            num_left = len(tail.token_ids) - self.num_scheduled(tail)
            assert [seq, tail] == self.running[-2:], f"{name}: a prefill amid the running list"
            assert num_tokens - num_scheduled <= num_left, f"{name} overtakes a shorter one"
        for i, block in enumerate(seq.block_ids):
            if (i + 1) * size > seq.num_computed:
                assert self.blocks.pool.ref_count(block) == 1, f"{name}: unfinished block {block} is shared"
                assert not self.blocks.pool.is_published(block), (
                    f"{name}: unfinished block {block} is matchable"
                )


def _count_loras(sequences: list[Sequence]) -> Counter[int]:
    return Counter(seq.request.lora.lora_id for seq in sequences if seq.request.lora is not None)
