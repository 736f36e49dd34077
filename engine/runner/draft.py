"""DraftModel: a second, smaller decoder beside the runner's, which guesses the tokens that a step then computes.

It has a KV cache of its own in the blocks of the same tables, and reads and writes the same row buffers: a guess is drawn
with its row's settings, and with the noise of its seed and position, and put where the target's own choice will be.

Boundary: computes what a ``DraftPlan`` says. What it has computed is ``engine.draft_progress``'s to know; which guesses were
right, the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.interface import AttentionBackend
from engine.models.decoder import LayerCache, StepDecoder
from engine.plan import DraftPlan, Int32, KVSpec, StepPlan
from engine.runner.batch import RowBatch
from engine.runner.step_cost import StepCost, StepNeeds


@dataclass(frozen=True, slots=True)
class Guesses:
    """Of one step: those of each round, on their way to the host."""

    rounds: list[tuple[Int32, Tensor]]  # rows [n] that have another guess, and their tokens [n]

    def by_row(self) -> dict[int, list[int]]:
        """Each row's guesses; waits for the device."""
        found: dict[int, list[int]] = {}
        for rows, token_ids in self.rounds:
            for row, token in zip(rows.tolist(), token_ids.tolist(), strict=True):
                found.setdefault(row, []).append(token)
        return found


NO_GUESSES = Guesses([])


class DraftModel:
    """The draft model of one runner.

    Args:
        decoder, attention: as the runner's, of the draft model.
        kv_spec: its KV cache's; blocks have as many tokens as the target's.
        make_caches: allocates that cache, for as many blocks as the target has.
        load_decoder: makes `decoder` anew, for waking up from a sleep that did not keep it.
    """

    def __init__(
        self,
        decoder: StepDecoder,
        attention: AttentionBackend,
        *,
        kv_spec: KVSpec,
        make_caches: Callable[[], list[LayerCache]],
        load_decoder: Callable[[], StepDecoder],
    ) -> None:
        self._decoder: StepDecoder | None = decoder
        self._attention = attention
        self._make_caches = make_caches
        self._load_decoder = load_decoder
        self._caches = make_caches()
        self._cost = StepCost(decoder.config, kv_spec, decoder.step_weights())

    def guess(self, plan: DraftPlan, batch: RowBatch) -> tuple[Guesses, StepNeeds]:
        """Compute what the plan says, and put each row's guesses behind its last token; and what that needed.

        The plan's own deltas were applied to `batch`.
        """
        num_guesses = plan.num_guesses
        step = _step(plan.rows, plan.start, plan.num_tokens, np.flatnonzero(num_guesses))
        rounds, needs = [], StepNeeds(0, 0, 0, 0)
        for round_number in range(max(1, int(num_guesses.max()))):
            if round_number:
                more = num_guesses > round_number
                behind = (plan.start + plan.num_tokens)[more] + (round_number - 1)
                ones = np.ones(len(behind), np.int32)
                step = _step(plan.rows[more], behind.astype(np.int32), ones, np.arange(len(behind)))
            token_ids = self._compute(step, batch)
            needs += self._cost.of(step)
            if token_ids is not None:
                rounds.append((step.rows[step.logit_rows], token_ids))
        return Guesses(rounds), needs

    def sleep(self, level: int) -> None:
        """Give the KV cache back, and at level 2 the weights."""
        self._caches.clear()  # in place: a decoder may know the list
        if level == 2:
            self._decoder = None

    def wake_up(self) -> None:
        """Be as before `sleep`, but for what the KV cache held."""
        self._caches = self._make_caches()
        if self._decoder is None:
            self._decoder = self._load_decoder()

    def _compute(self, step: StepPlan, batch: RowBatch) -> Tensor | None:
        """The tokens drawn for the rows that sample; None where the step only catches up."""
        assert self._decoder is not None, "the draft model is asleep"
        inputs = batch.step_inputs(step)
        hidden = self._decoder.forward(
            inputs.token_ids, inputs.positions, self._caches, inputs.meta, self._attention
        )
        if not len(step.logit_rows):
            return None
        if len(step.logit_rows) < len(hidden):
            hidden = hidden.index_select(0, inputs.logit_index)
        logits = self._decoder.logits(hidden)
        return batch.choose(logits, step).token_ids.to("cpu", non_blocking=True)


def _step(rows: Int32, start: Int32, num_tokens: Int32, sampling: NDArray[np.intp]) -> StepPlan:
    """The step of these rows alone, of which those at the indices `sampling` sample."""
    nothing = np.zeros(len(rows) + 1, np.int32)
    return StepPlan(
        step_id=0,
        rows=rows,
        start=start,
        num_tokens=num_tokens,
        num_draft=nothing[:-1],
        logit_rows=sampling.astype(np.int32),
        new_block_offsets=(nothing,),
        new_block_ids=(nothing[:0],),
    )
