"""PlanBuilder: a PlannedStep as the struct of arrays that a runner gets.

Boundary: layout only; which rows compute what is decided in ``engine.scheduler``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.plan import Int32, RowAdmission, StepPlan
from engine.planned_step import Chunk, PlannedStep


class PlanBuilder:
    """Builds plans of at most `max_num_seqs` rows in O(rows)."""

    def __init__(self, max_num_seqs: int) -> None:
        # Constant columns, shared by all plans, as row numbers are by steps alike: runners read and never write to them.
        self._zeros = np.zeros(max_num_seqs + 1, np.int32)
        self._ones = np.ones(max_num_seqs, np.int32)
        self._indices = np.arange(max_num_seqs, dtype=np.int32)

    def build(
        self, step: PlannedStep, admitted: Sequence[RowAdmission], finished_rows: Sequence[int]
    ) -> StepPlan:
        """The plan of `step`, whose chunks are put in plan order: those of one token first."""
        num_decoding = len(step.decoding)
        num_rows = num_decoding + len(step.chunks)
        rows, start = step.decoding.rows, step.start
        num_tokens, logit_rows = self._ones[:num_rows], self._indices[:num_rows]
        num_draft, drafts = self._zeros[:num_rows], self._zeros[:0]
        if step.chunks:
            step.chunks.sort(key=_computes_several)  # stable
            chunks = step.chunks
            rows = np.concatenate((rows, np.array([chunk.seq.row for chunk in chunks], np.int32)))
            start = np.concatenate((start, np.array([chunk.start for chunk in chunks], np.int32)))
            num_tokens = num_tokens.copy()
            num_tokens[num_decoding:] = [chunk.num_tokens for chunk in chunks]
            sampling = [num_decoding + i for i, chunk in enumerate(chunks) if chunk.samples]
            logit_rows = np.concatenate((logit_rows[:num_decoding], np.array(sampling, np.int32)))
            if step.num_draft_tokens:
                num_draft = num_draft.copy()
                num_draft[num_decoding:] = [len(chunk.drafts) for chunk in chunks]
            if step.num_draft_tokens and step.drafting is None:
                drafts = np.array([token for chunk in chunks for token in chunk.drafts], np.int32)
        offsets, block_ids = self._block_arrays(step, num_rows)
        return StepPlan(
            step_id=step.step_id,
            rows=rows,
            start=start,
            num_tokens=num_tokens,
            num_draft=num_draft,
            logit_rows=logit_rows,
            new_block_offsets=(offsets,),
            new_block_ids=(block_ids,),
            admitted=tuple(admitted),
            finished=tuple(finished_rows),
            copies=step.copies,
            draft_token_ids=drafts,
            drafting=None if step.drafting is None else step.drafting.plan(),
        )

    def _block_arrays(self, step: PlannedStep, num_rows: int) -> tuple[Int32, Int32]:
        """Blocks appended to each row's table, as offsets and ids."""
        growth, num_decoding = step.growth, len(step.decoding)
        growth += [(num_decoding + i, chunk.fresh) for i, chunk in enumerate(step.chunks) if chunk.fresh]
        if not growth:
            return self._zeros[: num_rows + 1], self._zeros[:0]
        offsets = np.zeros(num_rows + 1, np.int32)
        for i, fresh in growth:
            offsets[i + 1] = len(fresh)
        np.cumsum(offsets, dtype=np.int32, out=offsets)
        return offsets, np.array([block for _, fresh in growth for block in fresh], np.int32)


def _computes_several(chunk: Chunk) -> bool:
    return chunk.num_tokens > 1
