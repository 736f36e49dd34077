"""FakeRunner: an engine without a model, for tests, demonstrations and measurements of the host side.

FakeRunner computes tokens that anybody can work out by hand (`next_token`), answers as late as a device does, and checks
each plan as strictly as a device would punish it: tables must cover positions, slots must be written before they are read,
nobody writes to a block that others use. Its KV cache and its host tier hold one number per slot that depends on the whole
past, so that a wrongly shared, copied or reused block changes the tokens that follow. FakeTokenizer, whose tokens are bytes,
goes with it, and FakeDraft, which guesses.

Boundary: no torch, no randomness. Sampling parameters other than log-probabilities and grammars are ignored.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.fake_draft import FakeDraft
from engine.fake_rule import STATE_MODULUS, UNWRITTEN, expected_tokens, next_state, next_token
from engine.fake_tokenizer import FakeTokenizer
from engine.plan import NO_COPIES, BlockCopies, Int32, RowAdmission, StepPlan, StepResult, TokenLogprobs
from engine.sampling_params import ALL_LOGPROBS

if TYPE_CHECKING:
    from engine.runner.structured import GrammarRows

__all__ = [
    "FakeRunner", "FakeTokenizer", "PlanViolation", "expected_tokens", "fake_logprobs", "next_state", "next_token", "scripted",
]  # fmt: skip

FAKE_HIDDEN = 16  # size of the hidden states that are pooled
# Bytes that bring a JSON text to its end, first things first: inside of a string, and outside.
ENDS_STRING = b'"}]:'
ENDS_VALUE = b'}]":'

Choose = Callable[
    [str, int], int | None
]  # (request_id, index of the output token) -> token id; None: by the rule


class PlanViolation(AssertionError):
    """A plan that would make a real device read garbage or overwrite what others need."""


def fake_logprobs(token_id: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    """Log-probabilities that depend on the token alone: the chosen one first, then its successors."""
    top = [(token_id + i) % vocab_size for i in range(min(num_top, vocab_size))]
    logprob = -0.125 * (1 + token_id % 8)
    return TokenLogprobs(token_id, logprob, 1, tuple(top), tuple(logprob - 0.5 * i for i in range(len(top))))


def fake_row(entry: TokenLogprobs, vocab_size: int) -> NDArray[np.float32]:
    """A row of logits whose log-softmax has the entry's log-probability at its token; the others share the rest."""
    rest = math.log(-math.expm1(entry.logprob) / max(1, vocab_size - 1))
    row = np.full(vocab_size, rest, np.float32)
    row[entry.token_id % vocab_size] = entry.logprob
    return row


def fake_hidden(token_ids: Sequence[int]) -> NDArray[np.float64]:
    """Hidden states [n, FAKE_HIDDEN]: each token's is one-hot, by its id."""
    states: NDArray[np.float64] = np.eye(FAKE_HIDDEN)[np.array(token_ids) % FAKE_HIDDEN]
    return states


def scripted(text: str | bytes, eos_token_id: int = 256) -> Choose:
    """Makes every request answer `text`, byte by byte, and then the end-of-sequence token."""
    data = text.encode() if isinstance(text, str) else text
    return lambda _request_id, index: data[index] if index < len(data) else eos_token_id


class _Row:
    """A row as the device keeps it: its tokens and its block table."""

    __slots__ = ("admission", "blocks", "num_tokens", "slots", "states", "tokens")

    def __init__(self, admission: RowAdmission) -> None:
        self.admission = admission
        self.tokens: list[int] = list(admission.token_ids)
        self.blocks: list[int] = []
        self.slots = np.zeros(0, np.int64)  # slot of each position that the table covers
        self.states = np.zeros(0, np.int64)  # what those slots must hold


class FakeRunner:
    """A Runner whose tokens follow `next_token`.

    Args:
        num_blocks, block_size: the KV cache; plans may not leave it.
        num_host_blocks: slots of the host tier.
        vocab_size: output tokens are below it.
        max_inflight: steps that may be submitted before one is collected.
        delay_s: how long a step takes on this device, after the step before it.
        draft_delay_s: how much longer, for each guess of a row that the draft model makes.
        choose: overrides the rule, for an end of sequence or a text of one's own.
        verify: check every plan and read the whole context; False costs less and only counts (`next_token` of state 0),
            for measuring the host side.
        fail_at: step_id -> exception that collecting this step raises; `fail_next` does the same without a number.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        num_host_blocks: int = 0,
        vocab_size: int = 256,
        max_inflight: int = 2,
        delay_s: float = 0.0,
        draft_delay_s: float = 0.0,
        choose: Choose | None = None,
        verify: bool = True,
        fail_at: dict[int, Exception] | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.delay_s = delay_s
        self.draft_delay_s = draft_delay_s
        self.choose = choose
        self.fail_at = dict(fail_at or {})
        self.violations: list[str] = []
        self.plans: deque[StepPlan] = deque(maxlen=1024)  # the latest ones, for tests to look at
        self.closed = False
        self.sleep_level = 0  # 0: awake
        self._max_inflight = max_inflight
        self._verify = verify
        self._kv = np.full(num_blocks * block_size if verify else 0, UNWRITTEN, np.int64)
        self._draft = FakeDraft(len(self._kv), vocab_size, self._check, self._choose)
        self._host = np.full((num_host_blocks, block_size), UNWRITTEN, np.int64)
        self._rows: dict[int, _Row] = {}
        self._grammars: GrammarRows | None = None  # made for the first row that follows one
        self._users: Counter[int] = Counter()  # rows whose table holds a block
        self._inflight: deque[tuple[float, StepResult | Exception]] = deque()
        self._copying: deque[BlockCopies] = deque()  # of the steps in flight
        self._device_free_at = 0.0
        self._fail_submit: Exception | None = None
        self._fail_collect: Exception | None = None
        # A step in flight failed: what follows it computes on garbage until `reset_rows`.
        self._is_broken = False

    @property
    def max_inflight(self) -> int:
        return self._max_inflight

    def fail_next(self, error: Exception, *, in_submit: bool = False) -> None:
        """Make the next submitted step raise `error`: when it is collected, or already while it is submitted."""
        if in_submit:
            self._fail_submit = error
        else:
            self._fail_collect = error

    def submit(self, plan: StepPlan) -> None:
        """Compute the step, as a stream would in order, and keep its result until it is collected."""
        assert not self.closed, "the runner is closed"
        assert not self.sleep_level, "the runner is asleep"
        assert len(self._inflight) < self._max_inflight, f"more than {self._max_inflight} steps in flight"
        if self._fail_submit is not None:
            error, self._fail_submit = self._fail_submit, None
            self._is_broken = True
            raise error
        self._device_free_at = max(self._device_free_at, time.monotonic()) + self.delay_s
        if plan.drafting is not None:
            self._device_free_at += self.draft_delay_s * int(plan.drafting.num_guesses.max())
        result = self._run(plan)
        self._inflight.append((self._device_free_at, result))
        self._copying.append(plan.copies)

    def _run(self, plan: StepPlan) -> StepResult | Exception:
        failure = self.fail_at.pop(plan.step_id, None) or self._fail_collect
        self._fail_collect = None
        if self._is_broken:
            return RuntimeError("a step before this one failed")
        if failure is None:
            return self._compute(plan)
        self._is_broken = True
        if self._verify:
            self._scribble(plan)
        return failure

    def _scribble(self, plan: StepPlan) -> None:
        """What a step that dies half-way may leave behind: garbage in every place that it was to write."""
        self._apply_row_events(plan)
        self._host[plan.copies.out[:, 1]] = STATE_MODULUS
        self._blocks()[plan.copies.back[:, 1]] = STATE_MODULUS
        for row_id, start, count in zip(
            plan.rows.tolist(), plan.start.tolist(), plan.num_tokens.tolist(), strict=True
        ):
            self._kv[self._rows[row_id].slots[start : start + count]] = STATE_MODULUS
        self._draft.scribble(plan.drafting, self._rows)

    def collect(self) -> StepResult:
        """The oldest step's result, not before the device is done with it."""
        ready_at, result = self._inflight.popleft()
        self._copying.popleft()
        if self.delay_s and (wait := ready_at - time.monotonic()) > 0:
            time.sleep(wait)
        if isinstance(result, Exception):
            raise result
        return result

    def reset_rows(self) -> None:
        self._rows.clear()
        if self._grammars is not None:
            self._grammars.reset()
        self._users.clear()
        self._inflight.clear()
        self._copying.clear()
        self._is_broken = False

    def sleep(self, level: int) -> None:
        """What the KV cache and the host tier held is gone."""
        assert not self._inflight, "asleep with steps in flight"
        self.sleep_level = level
        self._kv[:] = UNWRITTEN
        self._draft.forget()
        self._host[:] = UNWRITTEN

    def wake_up(self) -> None:
        self.sleep_level = 0

    def close(self) -> None:
        self.closed = True
        self.reset_rows()
        self._kv = np.zeros(0, np.int64)

    # ── the device ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _compute(self, plan: StepPlan) -> StepResult:
        if not self._verify:
            tokens = ((plan.choices.positions - 1) * 7 % self.vocab_size).tolist()
            return self._obey_grammars(
                plan, StepResult(plan.step_id, tokens, guesses=self._draft.count(plan.drafting))
            )
        self.plans.append(plan)
        self._apply_row_events(plan)
        self._check_shape(plan)
        result = StepResult(plan.step_id, [], guesses=self._draft.guess(plan.drafting, self._rows))
        sampling = set(plan.logit_rows.tolist())
        guesses = iter(plan.draft_token_ids.tolist())
        num_draft = plan.num_draft.tolist()
        for i, (row_id, start, count) in enumerate(
            zip(plan.rows.tolist(), plan.start.tolist(), plan.num_tokens.tolist(), strict=True)
        ):
            row = self._rows[row_id]
            drafts = result.guesses.get(row_id) or [next(guesses) for _ in range(num_draft[i])]
            self._check(len(drafts) == num_draft[i], f"row {row_id}: {len(drafts)} guesses of {num_draft[i]}")
            row.tokens += drafts
            self._write(row, start, start + count)
            if row.admission.params.prompt_logprobs is not None:
                result.prompt_logprobs[i] = self._score(row, start, count)
            pooling = row.admission.params.pooling
            if pooling is not None:
                states = fake_hidden(row.tokens[start : start + count])
                result.pooled[i] = states[-1] if pooling.kind == "last" else states.sum(0)
            if i in sampling:
                self._sample(row, start + count, drafts, result)
        return self._obey_grammars(plan, result)

    def _apply_row_events(self, plan: StepPlan) -> None:
        for row_id in plan.finished:
            row = self._rows.pop(row_id, None)
            self._check(row is not None, f"row {row_id} finished but was never admitted")
            if row is not None:
                self._users.subtract(row.blocks)
        self._copy(plan.copies)
        for admission in plan.admitted:
            self._check(admission.row not in self._rows, f"row {admission.row} admitted twice")
            row = self._rows[admission.row] = _Row(admission)
            self._extend(row, admission.block_ids[0])
        offsets, ids = plan.new_block_offsets[0].tolist(), plan.new_block_ids[0].tolist()
        self._check(
            len(offsets) == plan.num_rows + 1 and offsets[-1] == len(ids), "new block offsets do not add up"
        )
        for i, row_id in enumerate(plan.rows.tolist()):
            self._check(row_id in self._rows, f"row {row_id} computes but was never admitted")
            if offsets[i + 1] > offsets[i]:
                self._extend(self._rows[row_id], ids[offsets[i] : offsets[i + 1]])

    def _copy(self, copies: BlockCopies) -> None:
        """Blocks to host slots, then slots to blocks; what is copied and what is overwritten must be nobody's."""
        if copies is NO_COPIES:
            return
        blocks, (sources, filled), (slots, targets) = self._blocks(), copies.out.T, copies.back.T
        for ids, places in ((sources, blocks), (targets, blocks), (filled, self._host), (slots, self._host)):
            self._check(bool(((ids >= 0) & (ids < len(places))).all()), f"copies {ids} outside of the cache")
        for ids in (sources, targets, filled):
            self._check(len(set(ids.tolist())) == len(ids), f"a place twice in the copies of a step: {ids}")
        used = [block for block in (*sources.tolist(), *targets.tolist()) if self._users[block]]
        self._check(not used, f"copies blocks {used}, which rows use")
        read = {slot for earlier in self._copying for slot in earlier.back[:, 0].tolist()}
        self._check(
            read.isdisjoint(filled.tolist()), f"slots {filled} are written and a step in flight reads {read}"
        )
        self._check(bool((blocks[sources] != UNWRITTEN).all()), f"saves blocks {sources} that are not full")
        self._host[filled] = blocks[sources]
        self._check(bool((self._host[slots] != UNWRITTEN).all()), f"brings slots {slots} that hold nothing")
        blocks[targets] = self._host[slots]

    def _blocks(self) -> NDArray[np.int64]:
        """The KV cache block by block: [num_blocks, block_size], a view."""
        return self._kv.reshape(-1, self.block_size)

    def _extend(self, row: _Row, block_ids: Iterable[int]) -> None:
        new = list(block_ids)
        self._check(all(0 <= b < self.num_blocks for b in new), f"blocks {new} outside of the cache")
        row.blocks += new
        self._users.update(new)
        offsets = np.arange(self.block_size)
        fresh = (np.array(new, np.int64)[:, None] * self.block_size + offsets).ravel()
        row.slots = np.concatenate((row.slots, fresh))
        row.states = np.concatenate((row.states, np.zeros(len(fresh), np.int64)))
        if len(row.states) == len(fresh):  # admission: what the cached positions must hold
            state = 0
            for position, token in enumerate(row.tokens[: row.admission.num_computed]):
                row.states[position] = state = next_state(state, token)

    def _check_shape(self, plan: StepPlan) -> None:
        rows = plan.rows.tolist()
        self._check(len(set(rows)) == len(rows), f"a row twice in one step: {rows}")
        counts = plan.num_tokens.tolist()
        self._check(all(count > 0 for count in counts), f"a row without tokens: {counts}")
        several = [count > 1 for count in counts]
        self._check(several == sorted(several), f"one-token rows do not come first: {counts}")
        logit_rows = plan.logit_rows.tolist()
        self._check(logit_rows == sorted(set(logit_rows)), f"logit rows are not ascending: {logit_rows}")

    def _write(self, row: _Row, start: int, end: int) -> None:
        """Read the context through the table, then write positions start … end - 1."""
        name = row.admission.request_id
        self._check(
            end <= len(row.slots), f"{name}: position {end - 1} is behind its {len(row.blocks)} blocks"
        )
        self._check(end <= len(row.tokens), f"{name}: position {end - 1} has no token yet")
        context = self._kv[row.slots[:start]]
        self._check(
            bool((context == row.states[:start]).all()), f"{name}: context at {start} is not its own past"
        )
        for block in set(row.blocks[start // self.block_size : -(-end // self.block_size)]):
            self._check(self._users[block] == 1, f"{name}: writes to block {block}, which others use")
        state = int(context[-1]) if start else 0
        for position in range(start, end):
            state = next_state(state, row.tokens[position])
            self._kv[row.slots[position]] = row.states[position] = state

    def _sample(self, row: _Row, end: int, drafts: list[int], result: StepResult) -> None:
        """Choose a token behind the last known one and behind each guess; what was guessed wrongly goes."""
        name, params = row.admission.request_id, row.admission.params
        self._check(end == len(row.tokens), f"{name}: samples at {end} of {len(row.tokens)} tokens")
        chosen = [
            self._choose(row, at, int(self._kv[row.slots[at - 1]]))
            for at in range(end - len(drafts), end + 1)
        ]
        for token in chosen:
            if params.logprobs is not None:
                result.logprobs[len(result.token_ids)] = fake_logprobs(
                    token, params.logprobs, self.vocab_size
                )
            result.token_ids.append(token)
        num_right = next((i for i, token in enumerate(drafts) if token != chosen[i]), len(drafts))
        del row.tokens[end - len(drafts) + num_right :]
        row.tokens.append(chosen[num_right])

    def _choose(self, row: _Row, end: int, state: int) -> int:
        """The token at position `end`, behind a past of this state."""
        token = None
        if self.choose is not None:
            token = self.choose(row.admission.request_id, end - row.admission.num_prompt_tokens)
        if token is None:
            token = next_token(state, end - 1, self.vocab_size)
        return token

    def _obey_grammars(self, plan: StepPlan, result: StepResult) -> StepResult:
        """Tokens that a row's grammar does not allow become ones that it does."""
        grammars = self._follow(plan)
        step = None if grammars is None else grammars.followed(plan)
        if grammars is None or step is None:
            return result
        if self.delay_s and self._inflight:
            # The token before must be on the host, while this step's forward pass runs.
            time.sleep(max(0.0, self._inflight[-1][0] - time.monotonic()))
        masks = grammars.masks(step)
        for place, follower, mask in zip(step.places, step.followers, masks, strict=True):
            token = result.token_ids[place]
            if not mask[token // 32] >> token % 32 & 1:
                result.token_ids[place] = _first_allowed(mask, follower.stop_token_ids)
        grammars.advance(step, result.token_ids)
        if self._verify:
            sampling = plan.rows[plan.choices.row_index].tolist()
            for place in step.places:
                self._rows[sampling[place]].tokens[-1] = result.token_ids[place]
        result.dead_ends.update(step.dead_ends)
        self._device_free_at = max(self._device_free_at, time.monotonic())
        return result

    def _follow(self, plan: StepPlan) -> GrammarRows | None:
        """The rows that follow grammars, after the plan's comings and goings; None while there never was one."""
        if self._grammars is None:
            grammars = [admission.grammar for admission in plan.admitted if admission.grammar is not None]
            if not grammars:
                return None
            from engine.runner.structured import GrammarRows

            # Of all tokens of the tokenizer; those that nothing chooses by the rule are beyond `vocab_size`.
            self._grammars = GrammarRows(grammars[0].vocab_size)
        for row in plan.finished:
            self._grammars.leave(row)
        for admission in plan.admitted:
            self._grammars.leave(admission.row)
            self._grammars.admit(admission, None)
        return self._grammars

    def _score(self, row: _Row, start: int, count: int) -> list[TokenLogprobs]:
        params, end = row.admission.params, min(start + count + 1, row.admission.num_prompt_tokens)
        begin = max(start + 1, params.logprob_start_len)
        entries = [
            fake_logprobs(token, max(0, params.prompt_logprobs or 0), self.vocab_size)
            for token in row.tokens[begin:end]
        ]
        if params.prompt_logprobs == ALL_LOGPROBS:
            entries = [replace(entry, logits=fake_row(entry, self.vocab_size)) for entry in entries]
        return entries

    def _check(self, holds: bool, message: str) -> None:
        if not holds:
            self.violations.append(message)
            raise PlanViolation(message)


def _first_allowed(mask: Int32, stop_token_ids: frozenset[int]) -> int:
    """The end where it is allowed, else a byte that leads there, else the first token."""
    for token in sorted(stop_token_ids):
        if mask[token // 32] >> token % 32 & 1:
            return token
    bits = np.unpackbits(mask[:8].view(np.uint8), bitorder="little")  # of the bytes
    for token in ENDS_STRING if bits[ord("a")] else ENDS_VALUE:
        if bits[token]:
            return token
    visible = np.flatnonzero(bits[ord("!") :])
    if len(visible):
        return ord("!") + int(visible[0])
    word = int(np.flatnonzero(mask)[0])
    return 32 * word + int(
        np.flatnonzero(np.unpackbits(mask[word : word + 1].view(np.uint8), bitorder="little"))[0]
    )
