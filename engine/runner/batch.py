"""Row buffers: what the runner keeps of each running sequence between steps.

A row holds its tokens (on the device, where sampling writes them), its block table and its sampling settings. Plans bring
deltas; `apply` and `step_inputs` cost O(scheduled rows + tokens of the step), never O(context).

Boundary: one KV group. No model, no sampling. On a CPU the host's and the device's block tables are one memory, and a
step's inputs are made without torch: each of its operations lets other Python threads take the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.interface import AttentionMetadata
from engine.plan import RowAdmission, StepPlan
from engine.runner.sampler import SampleSettings

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One flat step on the device. T tokens, S rows, L rows that sample."""

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int64
    meta: AttentionMetadata
    logit_index: Tensor  # [L] int64, flat token whose hidden state is sampled from
    write_index: Tensor  # [L] int64, place of the sampled token in the flat token buffer


class RowBatch:
    """Buffers of `max_num_seqs` rows."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.row_tokens = max_model_len + 1
        self.row_blocks = -(-max_model_len // block_size) + 1
        self.tokens = torch.zeros(max_num_seqs, self.row_tokens, dtype=torch.int32, device=device)
        self._flat_tokens = self.tokens.view(-1)
        self.host_tables = np.zeros((max_num_seqs, self.row_blocks), dtype=np.int32)
        self.tables = torch.from_numpy(self.host_tables).to(device)  # the same memory on a CPU
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.temperature = np.zeros(max_num_seqs)
        self.top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self.top_p = np.ones(max_num_seqs)
        self.min_p = np.zeros(max_num_seqs)
        self.seed = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_logprobs = np.full(max_num_seqs, -1, dtype=np.int64)
        self.wants_prompt_logprobs = np.zeros(max_num_seqs, dtype=bool)
        self.min_length = np.zeros(
            max_num_seqs, dtype=np.int64
        )  # positions before it must not hold a stop token
        self.stop_ids: dict[int, tuple[int, ...]] = {}  # of rows with a min_length

    def apply(self, plan: StepPlan) -> None:
        """Rows given back, rows taken, blocks appended: in this order."""
        for row in plan.finished:
            self._clear(row)
        for admission in plan.admitted:
            self._admit(admission)
        if len(plan.new_block_ids[0]):
            self._append_blocks(plan)

    def reset(self) -> None:
        """Forget every row."""
        for row in range(len(self.num_blocks)):
            self._clear(row)

    def step_inputs(self, plan: StepPlan) -> StepInputs:
        """The step's flat tensors; one upload on a GPU."""
        rows, start, count = (a.astype(np.int64) for a in (plan.rows, plan.start, plan.num_tokens))
        total = int(count.sum())
        query_start = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(count, out=query_start[1:])
        row_of = np.repeat(rows, count)
        positions = np.arange(total) + np.repeat(start - query_start[:-1], count)
        blocks = self.host_tables[row_of, positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + positions % self.block_size
        end = start + count
        picked = plan.logit_rows
        max_seq_len = int(end.max())
        columns = -(-max_seq_len // self.block_size)
        token_index = row_of * self.row_tokens + positions
        parts = (positions, slots, query_start[1:][picked] - 1, rows[picked] * self.row_tokens + end[picked])
        if self.device.type == "cpu":
            at, slot_mapping, logit_index, write_index = map(torch.from_numpy, parts)
            token_ids, tables, starts, seq_lens = map(
                torch.from_numpy,
                (
                    self._flat_tokens.numpy()[token_index],
                    self.host_tables[rows, :columns],
                    query_start.astype(np.int32),
                    end.astype(np.int32),
                ),
            )
        else:
            at, slot_mapping, logit_index, write_index, index, row_index, wide_starts, wide_lens = (
                self._upload((*parts, token_index, rows, query_start, end))
            )
            token_ids = self._flat_tokens.index_select(0, index)
            tables = self.tables[:, :columns].index_select(0, row_index)
            starts, seq_lens = wide_starts.int(), wide_lens.int()
        several = np.nonzero(count != 1)[0]
        meta = AttentionMetadata(
            query_start=starts,
            seq_lens=seq_lens,
            block_tables=tables,
            slot_mapping=slot_mapping,
            max_query_len=int(count.max()),
            max_seq_len=max_seq_len,
            num_decode_rows=int(several[0]) if len(several) else len(count),
        )
        return StepInputs(token_ids, at, meta, logit_index, write_index)

    def sample_settings(self, plan: StepPlan) -> SampleSettings:
        """Settings of the rows that sample, in the order of ``plan.logit_rows``."""
        picked = plan.logit_rows
        rows = plan.rows[picked]
        position = (plan.start[picked] + plan.num_tokens[picked]).astype(np.int64)
        early = np.nonzero(position < self.min_length[rows])[0]
        return SampleSettings(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            seed=self.seed[rows],
            position=position,
            num_logprobs=self.num_logprobs[rows],
            banned=tuple((int(i), self.stop_ids[int(rows[i])]) for i in early),
        )

    def write_tokens(self, inputs: StepInputs, token_ids: Tensor) -> None:
        """Put the sampled tokens [L] behind their rows' last tokens, for the next step to read."""
        if self.device.type == "cpu":
            self._flat_tokens.numpy()[inputs.write_index.numpy()] = token_ids.numpy()
            return
        self._flat_tokens.index_copy_(0, inputs.write_index, token_ids.int())

    def _admit(self, admission: RowAdmission) -> None:
        row, params = admission.row, admission.params
        self._clear(row)
        tokens = np.asarray(admission.token_ids, dtype=np.int64)
        blocks = np.asarray(admission.block_ids[0], dtype=np.int64)
        assert len(tokens) <= self.row_tokens, len(tokens)
        assert len(blocks) <= self.row_blocks, len(blocks)
        device_tokens, device_blocks = self._upload((tokens, blocks))
        self.tokens[row, : len(tokens)] = device_tokens.int()
        self.host_tables[row, : len(blocks)] = blocks
        if self.device.type != "cpu":
            self.tables[row, : len(blocks)] = device_blocks.int()
        self.num_blocks[row] = len(blocks)
        self.num_prompt_tokens[row] = admission.num_prompt_tokens
        self.temperature[row], self.seed[row] = params.temperature, admission.seed
        self.top_k[row], self.top_p[row], self.min_p[row] = params.top_k, params.top_p, params.min_p
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.wants_prompt_logprobs[row] = params.prompt_logprobs
        if params.min_tokens:
            ids = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_token_ids)
            self.stop_ids[row] = tuple(sorted(i for i in ids if 0 <= i < self.vocab_size))
            self.min_length[row] = (
                admission.num_prompt_tokens + params.min_tokens if self.stop_ids[row] else 0
            )

    def _clear(self, row: int) -> None:
        self.num_blocks[row] = 0
        self.min_length[row] = 0
        self.num_logprobs[row] = -1
        self.wants_prompt_logprobs[row] = False
        self.stop_ids.pop(row, None)

    def _append_blocks(self, plan: StepPlan) -> None:
        offsets, ids = plan.new_block_offsets[0].astype(np.int64), plan.new_block_ids[0].astype(np.int64)
        counts = np.diff(offsets)
        row_of = np.repeat(plan.rows.astype(np.int64), counts)
        columns = np.arange(len(ids)) + np.repeat(self.num_blocks[plan.rows] - offsets[:-1], counts)
        self.host_tables[row_of, columns] = ids
        self.num_blocks[plan.rows] += counts
        if self.device.type != "cpu":
            index, values = self._upload((row_of * self.row_blocks + columns, ids))
            self.tables.view(-1).index_copy_(0, index, values.int())

    def _upload(self, parts: tuple[Int64, ...]) -> tuple[Tensor, ...]:
        """Host arrays as device tensors, packed into one copy that does not wait for work in flight."""
        if self.device.type == "cpu":
            return tuple(torch.from_numpy(part) for part in parts)
        packed = torch.from_numpy(np.concatenate(parts)).pin_memory().to(self.device, non_blocking=True)
        return torch.split(packed, [len(part) for part in parts])
