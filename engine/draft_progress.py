"""DraftProgress: how far the keys and values of a draft model go, by sequence and by block, and what it computes next.

A draft model keeps its own KV in the blocks of its target's tables. It computes nothing while nothing is guessed: a sequence
that comes to be guessed first catches up, in steps whose other work goes on, within a budget of tokens. What it finds in the
prefix cache counts as far as the draft model computed those blocks; so does what a preempted sequence finds again. The host
tier keeps nothing of a draft model's.

Boundary: counts, block ids and digests. When to guess is ``engine.speculation``'s decision; blocks are not taken here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.plan import DraftPlan
from engine.request import Sequence, SequenceStatus


@dataclass(slots=True)
class DraftRow:
    """A sequence for which the draft model computes the tokens from `start` on, and then guesses."""

    seq: Sequence
    block_ids: list[int]  # its table, which it gives back if it ends with the step
    start: int
    num_tokens: int
    num_guesses: int  # 0: it only catches up


@dataclass(slots=True)
class Drafting:
    """What the draft model computes before one step."""

    rows: list[DraftRow]

    @property
    def catches_up(self) -> bool:
        """Whether any row computes what earlier steps left to it."""
        return any(not row.num_guesses for row in self.rows)

    def plan(self) -> DraftPlan:
        """The same as arrays by row, those of one token first."""
        rows = sorted(self.rows, key=lambda row: row.num_tokens > 1)
        columns = [(row.seq.row, row.start, row.num_tokens, row.num_guesses) for row in rows]
        return DraftPlan(*np.array(columns, np.int32).reshape(-1, 4).T.copy())


class DraftProgress:
    """Of the live sequences of one scheduler, and of the blocks that they left."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._ends: dict[Sequence, tuple[int, int]] = {}  # epoch, tokens with KV of the draft model
        # By block: the digest of the tokens whose KV the draft model has in all of it. Whoever it is given to, that stays true
        # until the draft model itself writes there.
        self._computed: dict[int, bytes] = {}

    def lag(self, seq: Sequence, end: int) -> int:
        """Tokens of `seq` before position `end` that the draft model has not computed."""
        return end - self._end(seq)

    def row(self, seq: Sequence, num_tokens: int, num_guesses: int) -> DraftRow:
        """`seq` has its next `num_tokens` tokens computed, and so many guessed behind them: it is planned."""
        start, size = self._end(seq), self._block_size
        end = start + num_tokens + max(0, num_guesses - 1)
        for block in seq.block_ids[start // size : -(-end // size)]:
            self._computed.pop(block, None)
        return DraftRow(seq, seq.block_ids, start, num_tokens, num_guesses)

    def commit(self, rows: Iterable[DraftRow], num_right: dict[Sequence, int]) -> None:
        """A step was taken in; `num_right` of the guesses of each sequence were right. Rows of those that left are not given."""
        for row in rows:
            seq, size = row.seq, self._block_size
            # The last guess was not computed; what is wrong has to be computed again.
            end = row.start + row.num_tokens + min(num_right.get(seq, 0), max(0, row.num_guesses - 1))
            if seq.status is not SequenceStatus.FINISHED:
                self._ends[seq] = (seq.epoch, end)
            for index in range(row.start // size, min(end // size, len(seq.block_hashes))):
                self._computed[row.block_ids[index]] = seq.block_hashes[index]

    def forget(self, seq: Sequence) -> None:
        """`seq` has ended."""
        self._ends.pop(seq, None)

    def forget_blocks(self) -> None:
        """The draft model's KV is gone, while no sequence runs."""
        self._computed.clear()

    def _end(self, seq: Sequence) -> int:
        """Tokens of `seq` from its first on that have KV of the draft model."""
        epoch, end = self._ends.get(seq, (-1, 0))
        if epoch != seq.epoch:
            num_blocks = 0
            for block, digest in zip(seq.block_ids, seq.block_hashes, strict=False):
                if self._computed.get(block) != digest:
                    break
                num_blocks += 1
            # The last token is computed in any case: what follows it is guessed from there.
            end = min(num_blocks * self._block_size, len(seq.token_ids) - 1)
            self._ends[seq] = (seq.epoch, end)
        return end
