"""Row buffers: what the runner keeps of each running sequence between steps.

A row holds its tokens, its block table and its sampling settings. Plans bring deltas; `apply` and `step_inputs` cost
O(scheduled rows + tokens of the step), never O(context).

`RowBatch` is what the host knows of the rows. `HostRowBatch` keeps tokens and tables in the host's memory and makes a
step's inputs with NumPy, for CPUs: each operation of torch lets other Python threads take the interpreter.
``engine.runner.device_batch`` keeps them on a device.

Boundary: one KV group. No model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.interface import AttentionMetadata
from engine.kernels.penalties import FULL, ONE_OUTPUT
from engine.plan import Int32, RowAdmission, StepPlan
from engine.pooling import Pooling
from engine.runner.controls import Controls, controls_of
from engine.runner.cpu_sampler import make_sampler
from engine.runner.sampler import LogitEdits, Masks, Sampled, SampleSettings
from engine.runner.structured import Followed, GrammarRows

Int64 = NDArray[np.int64]
NO_LOGPROBS = -2  # of a prompt; ALL_LOGPROBS is -1


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the buffers of all rows are made for."""

    max_num_seqs: int
    max_model_len: int
    block_size: int
    vocab_size: int
    eos_token_ids: frozenset[int]

    @property
    def row_tokens(self) -> int:
        """Tokens a row can hold: the last one sampled is stored too."""
        return self.max_model_len + 1

    @property
    def row_blocks(self) -> int:
        return -(-self.max_model_len // self.block_size) + 1


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One flat step. T tokens, S rows, L choices."""

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int64
    meta: AttentionMetadata
    logit_index: Tensor  # [L] int64, flat token whose hidden state is sampled from


class RowBatch(ABC):
    """The rows of one runner."""

    tokens: Tensor  # [rows, row_tokens] int32

    def __init__(self, shape: BatchShape) -> None:
        self.shape = shape
        rows = shape.max_num_seqs
        self.num_blocks = np.zeros(rows, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(rows, dtype=np.int64)
        self.num_logprobs = np.full(rows, -1, dtype=np.int64)
        self.prompt_logprobs = np.full(rows, NO_LOGPROBS, dtype=np.int64)
        self.logprob_start = np.zeros(rows, dtype=np.int64)
        self.pooling: dict[int, Pooling] = {}  # of rows whose hidden states become a vector
        self.controls: dict[int, Controls] = {}  # of rows that ask for any
        self.grammars = GrammarRows(shape.vocab_size)
        self._control_end = np.zeros(rows, dtype=np.int64)  # positions from it on are free of them

    def apply(self, plan: StepPlan) -> None:
        """Rows given back, rows taken, blocks appended: in this order."""
        for row in plan.finished:
            self._clear(row)
        for admission in plan.admitted:
            assert len(admission.token_ids) <= self.shape.row_tokens, len(admission.token_ids)
            assert len(admission.block_ids[0]) <= self.shape.row_blocks, len(admission.block_ids[0])
            self._clear(admission.row)
            self._note(admission)
            self._admit(admission)
        if len(plan.new_block_ids[0]):
            offsets, ids = plan.new_block_offsets[0].astype(np.int64), plan.new_block_ids[0].astype(np.int64)
            counts = np.diff(offsets)
            rows = np.repeat(plan.rows.astype(np.int64), counts)
            columns = np.arange(len(ids)) + np.repeat(self.num_blocks[plan.rows] - offsets[:-1], counts)
            self.num_blocks[plan.rows] += counts
            self._append_blocks(rows, columns, ids)

        if len(plan.draft_token_ids):
            rows = np.repeat(plan.rows, plan.num_draft).astype(np.int64)
            behind = np.repeat(np.cumsum(plan.num_draft), plan.num_draft) - np.arange(len(rows))
            end = np.repeat(plan.start + plan.num_tokens, plan.num_draft)
            self._put_tokens(rows, end.astype(np.int64) - behind, plan.draft_token_ids)

    def reset(self) -> None:
        """Forget every row."""
        for row in range(len(self.num_blocks)):
            self._clear(row)

    @abstractmethod
    def step_inputs(self, plan: StepPlan) -> StepInputs:
        """The flat tensors of the plan that was applied last."""

    @abstractmethod
    def limit(self, step: Followed) -> None:
        """What `choose` draws next for these rows is what their grammars allow."""

    @abstractmethod
    def choose(self, logits: Tensor, plan: StepPlan) -> Sampled:
        """Sample a token from each of the logits [L, V] and put it behind its row's last token, for the next step to read."""

    @abstractmethod
    def put_chosen(self, token_ids: Tensor, plan: StepPlan) -> None:
        """What `choose` does with its tokens [L], for tokens that another rank chose."""

    @abstractmethod
    def _admit(self, admission: RowAdmission) -> None:
        """Take over tokens, block table and sampling settings."""

    @abstractmethod
    def _append_blocks(self, rows: Int64, columns: Int64, ids: Int64) -> None:
        """Write block ids to their places in the tables."""

    @abstractmethod
    def _put_tokens(self, rows: Int64, positions: Int64, ids: Int32) -> None:
        """Write token ids to their places in the rows."""

    def scored(self, plan: StepPlan) -> Int64:
        """Which of the plan's rows want log-probabilities of their prompts."""
        return np.nonzero(self.prompt_logprobs[plan.rows] != NO_LOGPROBS)[0]

    def controlled(self, plan: StepPlan) -> Int64:
        """Which of the step's choices have controls that change their logits."""
        index, positions = plan.choices
        return np.nonzero(positions < self._control_end[plan.rows[index]])[0]

    def _note(self, admission: RowAdmission) -> None:
        row, params = admission.row, admission.params
        self.num_blocks[row] = len(admission.block_ids[0])
        self.num_prompt_tokens[row] = admission.num_prompt_tokens
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.prompt_logprobs[row] = NO_LOGPROBS if params.prompt_logprobs is None else params.prompt_logprobs
        self.logprob_start[row] = params.logprob_start_len
        if params.pooling is not None:
            self.pooling[row] = params.pooling
        controls = controls_of(admission, self.shape.eos_token_ids, self.shape.vocab_size)
        if controls is not None:
            self.controls[row] = controls
            self._control_end[row] = controls.end
            self.grammars.admit(admission, controls)

    def _clear(self, row: int) -> None:
        self.num_blocks[row] = 0
        self.num_logprobs[row] = -1
        self.prompt_logprobs[row] = NO_LOGPROBS
        self._control_end[row] = 0
        self.pooling.pop(row, None)
        self.controls.pop(row, None)
        self.grammars.leave(row)


class HostRowBatch(RowBatch):
    """Rows in the host's memory."""

    def __init__(self, shape: BatchShape, *, deterministic: bool) -> None:
        super().__init__(shape)
        rows = shape.max_num_seqs
        self.tokens = torch.zeros(rows, shape.row_tokens, dtype=torch.int32)
        self._tokens = self.tokens.numpy()  # the same memory
        self._tables = np.zeros((rows, shape.row_blocks), dtype=np.int32)
        self._temperature = np.zeros(rows)
        self._top_k = np.zeros(rows, dtype=np.int64)
        self._top_p = np.ones(rows)
        self._min_p = np.zeros(rows)
        self._typical_p = np.ones(rows)
        self._seed = np.zeros(rows, dtype=np.int64)
        self._marks: dict[int, NDArray[np.int16]] = {}  # [V], of rows with penalties
        self._biases: dict[int, NDArray[np.float32]] = {}  # [V], -inf where a token is not allowed
        self._masks: Masks | None = None  # of the step at hand
        self._sample = make_sampler(torch.device("cpu"), deterministic=deterministic)

    def step_inputs(self, plan: StepPlan) -> StepInputs:
        """The flat tensors of the plan that was applied last."""
        layout, size = flat_layout(plan), self.shape.block_size
        positions, max_seq_len = layout.positions, int(layout.seq_lens.max())
        blocks = self._tables[layout.row_of, positions // size].astype(np.int64)
        token_ids, at, slots, tables, starts, seq_lens, logit_index = map(
            torch.from_numpy,
            (
                self._tokens[layout.row_of, positions],
                positions,
                blocks * size + positions % size,
                self._tables[plan.rows, : -(-max_seq_len // size)],
                layout.query_start.astype(np.int32),
                layout.seq_lens.astype(np.int32),
                layout.logit_index,
            ),
        )
        meta = AttentionMetadata(
            query_start=starts,
            seq_lens=seq_lens,
            block_tables=tables,
            slot_mapping=slots,
            max_query_len=int(plan.num_tokens.max()),
            max_seq_len=max_seq_len,
            num_decode_rows=num_decode_rows(plan),
        )
        return StepInputs(token_ids, at, meta, logit_index)

    def limit(self, step: Followed) -> None:
        """What `choose` draws next for these rows is what their grammars allow."""
        self._masks = Masks(np.array(step.places, np.int64), self.grammars.masks(step))

    def choose(self, logits: Tensor, plan: StepPlan) -> Sampled:
        """Sample a token from each of the logits [L, V] and put it behind its row's last token, for the next step to read."""
        index, position = plan.choices
        rows = plan.rows[index]
        controlled = self.controlled(plan)
        settings = SampleSettings(
            temperature=self._temperature[rows],
            top_k=self._top_k[rows],
            top_p=self._top_p[rows],
            min_p=self._min_p[rows],
            typical_p=self._typical_p[rows],
            seed=self._seed[rows],
            position=position,
            num_logprobs=self.num_logprobs[rows],
            edits=tuple(self._edits(i, int(rows[i]), int(position[i])) for i in controlled.tolist()),
            masks=self._masks,
        )
        self._masks = None
        sampled = self._sample(logits, settings)
        self._tokens[rows, position] = sampled.token_ids.numpy()
        for i in controlled.tolist():
            marks = self._marks.get(int(rows[i]))
            if marks is not None and marks[token := int(sampled.token_ids[i])] < FULL:
                marks[token] += ONE_OUTPUT
        return sampled

    def put_chosen(self, token_ids: Tensor, plan: StepPlan) -> None:
        """What `choose` does with its tokens [L], for tokens that another rank chose."""
        index, position = plan.choices
        self._tokens[plan.rows[index], position] = token_ids.numpy()

    def _edits(self, index: int, row: int, position: int) -> LogitEdits:
        """How the logits of `row` change at `position`."""
        controls = self.controls[row]
        return LogitEdits(
            index,
            self._biases.get(row),
            self._marks.get(row),
            (controls.repetition, controls.frequency, controls.presence),
            tuple(controls.banned(self._tokens[row, controls.num_prompt_tokens : position])),
        )

    def _admit(self, admission: RowAdmission) -> None:
        row, params, blocks = admission.row, admission.params, admission.block_ids[0]
        self._tokens[row, : len(admission.token_ids)] = admission.token_ids
        self._tables[row, : len(blocks)] = blocks
        self._temperature[row], self._seed[row] = params.temperature, admission.seed
        self._top_k[row], self._top_p[row], self._min_p[row] = params.top_k, params.top_p, params.min_p
        self._typical_p[row] = params.typical_p
        if row in self.controls:
            self._admit_controls(row, self.controls[row], admission.token_ids)

    def _admit_controls(self, row: int, controls: Controls, token_ids: Sequence[int]) -> None:
        vocab = self.shape.vocab_size
        if controls.counts_tokens:
            ids, values = controls.marks(token_ids)
            self._marks[row] = marks = np.zeros(vocab, dtype=np.int16)
            marks[ids] = values
        if controls.biases or controls.allowed is not None:
            is_limited = controls.allowed is not None
            self._biases[row] = biases = np.full(vocab, -np.inf if is_limited else 0.0, dtype=np.float32)
            biases[list(controls.allowed or ())] = 0.0
            biases[list(controls.biases)] += np.array(list(controls.biases.values()), dtype=np.float32)

    def _clear(self, row: int) -> None:
        super()._clear(row)
        self._marks.pop(row, None)
        self._biases.pop(row, None)

    def _append_blocks(self, rows: Int64, columns: Int64, ids: Int64) -> None:
        self._tables[rows, columns] = ids

    def _put_tokens(self, rows: Int64, positions: Int64, ids: Int32) -> None:
        self._tokens[rows, positions] = ids


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """Where a plan's tokens stand side by side. T tokens, S rows, L choices; all int64."""

    row_of: Int64  # [T]
    positions: Int64  # [T]
    query_start: Int64  # [S + 1]
    seq_lens: Int64  # [S], with this step's tokens
    logit_index: Int64  # [L], the token whose hidden state is sampled from


def flat_layout(plan: StepPlan) -> FlatLayout:
    """The layout of a step, rows in the plan's order."""
    rows, start, count = (a.astype(np.int64) for a in (plan.rows, plan.start, plan.num_tokens))
    query_start = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(count, out=query_start[1:])
    row_of = np.repeat(rows, count)
    positions = np.arange(len(row_of)) + np.repeat(start - query_start[:-1], count)
    index, chosen = plan.choices
    return FlatLayout(
        row_of, positions, query_start, start + count, query_start[index] + chosen - 1 - start[index]
    )


def num_decode_rows(plan: StepPlan) -> int:
    """Rows of one token, which a plan has in front."""
    several = np.nonzero(plan.num_tokens != 1)[0]
    return int(several[0]) if len(several) else plan.num_rows
