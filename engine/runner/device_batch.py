"""Rows in a device's memory: tokens, block tables and sampling settings stay there, a step brings what is new in one copy.

Steps of any shape are made here, operation by operation; ``engine.runner.decode_graphs`` replays those that only decode.
Nothing here waits for the device, and nothing is read back from it.

One row more than the scheduler knows is kept, with a block of its own: what the padding of a step of fixed size reads and
writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from engine.attention.interface import AttentionMetadata
from engine.kernels import logprobs, sampling
from engine.kernels.sampling import RowSettings
from engine.plan import RowAdmission, StepPlan
from engine.runner.batch import BatchShape, Int64, RowBatch, StepInputs, flat_layout, num_decode_rows
from engine.runner.controls import NEVER_ENDS
from engine.runner.device_controls import DeviceControls
from engine.runner.sampler import LogprobTensors, Sampled, token_logprobs
from engine.runner.structured import Followed

ALIGNMENT = 4  # int32 values in 16 bytes: a kernel is compiled anew for an address that is less aligned
Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Choice:
    """Of a step whose inputs were made: the rows that sample [L], where their tokens go, who wants more."""

    rows: Tensor
    positions: Tensor
    wanted: Tensor  # indices of the rows that want log-probabilities


class DeviceRowBatch(RowBatch):
    """Rows on `device`; padding uses the KV block `idle_block`."""

    def __init__(self, shape: BatchShape, device: torch.device, *, idle_block: int) -> None:
        super().__init__(shape)
        rows = shape.max_num_seqs + 1
        self.device = device
        self.idle_row = shape.max_num_seqs
        self.tokens = torch.zeros(rows, shape.row_tokens, dtype=torch.int32, device=device)
        self.tables = torch.zeros(rows, shape.row_blocks, dtype=torch.int32, device=device)
        self.tables[self.idle_row] = idle_block
        self._settings = torch.zeros(7, rows, dtype=torch.int32, device=device)
        temperature, top_k, top_p, min_p, typical_p, seed_low, seed_high = self._settings
        self.settings = RowSettings(
            temperature=temperature.view(torch.float32),
            top_k=top_k,
            top_p=top_p.view(torch.float32),
            min_p=min_p.view(torch.float32),
            typical_p=typical_p.view(torch.float32),
            seed_low=seed_low,
            seed_high=seed_high,
        )
        self._device_controls: DeviceControls | None = None  # made for the first row that asks
        self._is_filtered = np.zeros(shape.max_num_seqs, dtype=bool)  # by top_k, top_p, min_p or typical_p
        self._is_typical = np.zeros(shape.max_num_seqs, dtype=bool)  # by typical_p
        self._admitted: list[RowAdmission] = []  # since the last upload
        self._table_entries: list[tuple[Int64, Int64, Int64]] = []  # likewise: rows, columns, block ids
        self._choice: _Choice | None = None

    def step_inputs(self, plan: StepPlan) -> StepInputs:
        """The flat tensors of the plan that was applied last, by one copy to the device."""
        layout, (index, chosen) = flat_layout(plan), plan.choices
        row_at, at, rows, starts, seq_lens, logit_index, *rest = self._upload(
            layout.row_of, layout.positions, plan.rows, layout.query_start, layout.seq_lens, layout.logit_index,
            plan.rows[index], chosen, self.wanted(plan),
        )  # fmt: skip
        size, max_seq_len, wide = self.shape.block_size, int(layout.seq_lens.max()), at.long()
        meta = AttentionMetadata(
            query_start=starts,
            seq_lens=seq_lens,
            block_tables=self.tables[:, : -(-max_seq_len // size)].index_select(0, rows),
            slot_mapping=self.tables[row_at, at // size].long() * size + wide % size,
            max_query_len=int(plan.num_tokens.max()),
            max_seq_len=max_seq_len,
            num_decode_rows=num_decode_rows(plan),
        )
        self._choice = _Choice(*rest)
        return StepInputs(self.tokens[row_at, at], wide, meta, logit_index.long())

    def limit(self, step: Followed) -> None:
        """What is drawn next for these rows is what their grammars allow: by one copy, behind the forward pass."""
        assert self._device_controls is not None, "a grammar is a control"
        allowed = self._device_controls.tables.allowed
        rows, masks = upload((step.rows, self.grammars.masks(step)), self.device)
        allowed[rows.long()] = masks.view(len(rows), -1)

    def choose(self, logits: Tensor, plan: StepPlan) -> Sampled:
        """Sample a token from each of the logits [L, V] and put it behind its row's last token, for the next step to read."""
        assert self._choice is not None, "the step's inputs were not made"
        choice, self._choice = self._choice, None
        raw = logits.float()
        token_ids = torch.empty(len(raw), dtype=torch.int32, device=self.device)
        self.draw(
            raw, choice.rows, choice.positions, token_ids, is_filtered=self.is_filtered(plan),
            is_typical=self.is_typical(plan), is_controlled=bool(len(self.controlled(plan))),
        )  # fmt: skip
        return self.sampled(raw, token_ids, plan, choice.wanted)

    def put_chosen(self, token_ids: Tensor, plan: StepPlan) -> None:
        """What `choose` does with its tokens [L], for tokens that another rank chose."""
        assert self._choice is not None, "the step's inputs were not made"
        choice, self._choice = self._choice, None
        self.tokens[choice.rows, choice.positions] = token_ids

    def draw(
        self,
        logits: Tensor,
        rows: Tensor,
        positions: Tensor,
        out: Tensor,
        *,
        is_filtered: bool,
        is_typical: bool,
        is_controlled: bool,
    ) -> None:
        """Write the tokens drawn from float32 logits [n, V] to `out` [n], and to these positions of these rows.

        `is_controlled`: some of the rows have controls, and theirs are applied.
        """
        if is_controlled:
            assert self._device_controls is not None, "no row ever asked for controls"
            logits = self._device_controls.apply(logits, rows, positions, self.tokens)
        on_gpu = self.device.type == "cuda"
        sample_tokens = sampling.sample_tokens if on_gpu else sampling.sample_tokens_ref
        sample_tokens(
            logits, rows, positions, self.settings, out, is_filtered=is_filtered, is_typical=is_typical
        )
        self.tokens[rows, positions] = out

    def sampled(self, logits: Tensor, token_ids: Tensor, plan: StepPlan, wanted: Tensor) -> Sampled:
        """The chosen tokens [L] with log-probabilities for the rows `wanted` of the float32 logits [L, V]."""
        rows = self.wanted(plan)
        if not len(rows):
            return Sampled(token_ids, None, ())
        num_top = int(self.num_logprobs[plan.rows[plan.logit_rows]].max())
        logits, ids = logits.index_select(0, wanted), token_ids.index_select(0, wanted)
        if self.device.type == "cuda":
            found = logprobs.token_logprobs(logits, ids, num_top)
            figures = LogprobTensors(ids, found.chosen, found.rank, found.top_ids, found.top_values)
        else:
            figures = token_logprobs(logits, ids, num_top)
        return Sampled(token_ids, figures, tuple(rows.tolist()))

    def wanted(self, plan: StepPlan) -> Int64:
        """Of which choices log-probabilities are wanted."""
        return np.nonzero(self.num_logprobs[plan.rows[plan.choices.row_index]] >= 0)[0]

    def is_filtered(self, plan: StepPlan) -> bool:
        """Whether any of the rows that sample drops tokens before it draws."""
        return bool(self._is_filtered[plan.rows[plan.logit_rows]].any())

    def is_typical(self, plan: StepPlan) -> bool:
        """Whether any of the rows that sample has typical_p."""
        return bool(self._is_typical[plan.rows[plan.logit_rows]].any())

    def forget_block_deltas(self) -> None:
        """The step at hand writes its new blocks to the tables itself."""
        assert not self._admitted, "an admission has to be uploaded"
        self._table_entries.clear()

    def reset(self) -> None:
        """Forget every row, and what was to be uploaded."""
        super().reset()
        self._admitted.clear()
        self._table_entries.clear()
        self._choice = None

    def _admit(self, admission: RowAdmission) -> None:
        params, blocks = admission.params, np.asarray(admission.block_ids[0], dtype=np.int64)
        if admission.grammar is not None:
            self._control_end[admission.row] = NEVER_ENDS
        self._is_typical[admission.row] = is_typical = params.typical_p < 1.0
        self._is_filtered[admission.row] = (
            is_typical or params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        )
        if self._device_controls is None and admission.row in self.controls:
            self._device_controls = DeviceControls(self.idle_row + 1, self.shape.vocab_size, self.device)
        self._admitted.append(admission)
        self._append_blocks(np.full(len(blocks), admission.row), np.arange(len(blocks)), blocks)

    def _append_blocks(self, rows: Int64, columns: Int64, ids: Int64) -> None:
        self._table_entries.append((rows, columns, ids))

    def _put_tokens(self, rows: Int64, positions: Int64, ids: Int32) -> None:
        at_rows, at, values = upload((rows, positions, ids), self.device)
        self.tokens[at_rows, at] = values

    def _upload(self, *parts: ArrayLike) -> list[Tensor]:
        """`parts` as int32 tensors on the device; what came with the plan's deltas is put to its places by the same copy."""
        admitted, self._admitted = self._admitted, []
        entries, self._table_entries = self._table_entries, []
        deltas = [np.concatenate(column) for column in zip(*entries, strict=True)]
        if admitted:
            deltas += [
                np.array([a.row for a in admitted]),
                np.stack([_settings_of(a) for a in admitted], axis=1),
            ]
            deltas += [np.asarray(a.token_ids) for a in admitted]
        tables = self._device_controls
        controls = [tables.parts(self.controls.get(a.row), a.token_ids) for a in admitted] if tables else []
        deltas += [part for parts_of_row in controls for part in parts_of_row]
        sent = upload((*parts, *deltas), self.device)
        news = sent[len(parts) :]
        if entries:
            rows, columns, blocks, *news = news
            self.tables[rows, columns] = blocks
        if admitted:
            rows, settings, *news = news
            self._settings.index_copy_(1, rows.long(), settings.view(len(self._settings), -1))
            for admission in admitted:
                tokens, *news = news
                self.tokens[admission.row, : len(tokens)] = tokens
        if tables is not None:
            for admission, own in zip(admitted, controls, strict=True):
                tables.put(admission.row, news[: len(own)])
                news = news[len(own) :]
        return sent[: len(parts)]


def upload(parts: Sequence[ArrayLike], device: torch.device) -> list[Tensor]:
    """Host values as flat int32 tensors on the device, packed into one copy that does not wait for work in flight."""
    arrays = [np.asarray(part, dtype=np.int32).ravel() for part in parts]
    starts = np.cumsum([0, *(-(-len(array) // ALIGNMENT) * ALIGNMENT for array in arrays)])
    packed = torch.empty(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    for start, array in zip(starts.tolist(), arrays, strict=False):
        packed.numpy()[start : start + len(array)] = array
    sent = packed.to(device, non_blocking=True)
    return [sent[start : start + len(array)] for start, array in zip(starts.tolist(), arrays, strict=False)]


def _settings_of(admission: RowAdmission) -> Int32:
    """The bits of the fields of RowSettings, in their order."""
    params, seed = admission.params, admission.seed
    given = [params.temperature, params.top_p, params.min_p, params.typical_p]
    floats = np.array(given, dtype=np.float32).view(np.int32)
    low, high = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], dtype=np.uint32).view(np.int32)
    return np.array([floats[0], params.top_k, *floats[1:], low, high], dtype=np.int32)
