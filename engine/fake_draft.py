"""FakeDraft: the draft model of a FakeRunner, which guesses two tokens of three rightly.

It has a KV cache of its own, of one number per slot that depends on the whole past, and checks that what it reads there is
what it wrote for that very past.

Boundary: no torch, no randomness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.fake_rule import STATE_MODULUS, UNWRITTEN, next_state
from engine.plan import DraftPlan, RowAdmission


class Row(Protocol):
    """A row as the runner keeps it."""

    admission: RowAdmission
    tokens: list[int]
    slots: NDArray[np.int64]  # of each position that its table covers


class FakeDraft:
    """Args:
    num_slots: of its KV cache.
    check: raises with the message where something does not hold.
    choose: the token at a position of a row, behind a past of this state.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        check: Callable[[bool, str], None],
        choose: Callable[[Any, int, int], int],
    ) -> None:
        self._kv = np.full(num_slots, UNWRITTEN, np.int64)
        self._vocab_size = vocab_size
        self._check = check
        self._choose = choose

    def guess(self, plan: DraftPlan | None, rows: Mapping[int, Row]) -> dict[int, list[int]]:
        """The guesses of each row that has any."""
        if plan is None:
            return {}
        several = [count > 1 for count in plan.num_tokens.tolist()]
        self._check(several == sorted(several), "the draft model's rows of one token do not come first")
        columns = (plan.rows, plan.start, plan.num_tokens, plan.num_guesses)
        found = {
            row: self._compute(rows[row], *figures)
            for row, *figures in zip(*(column.tolist() for column in columns), strict=True)
        }
        return {row: guesses for row, guesses in found.items() if guesses}

    def count(self, plan: DraftPlan | None) -> dict[int, list[int]]:
        """The guesses for a runner that only counts: all right."""
        if plan is None:
            return {}
        columns = (plan.rows, plan.start + plan.num_tokens, plan.num_guesses)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return {
            row: [(end - 1 + i) * 7 % self._vocab_size for i in range(count)]
            for row, end, count in rows
            if count
        }

    def scribble(self, plan: DraftPlan | None, rows: Mapping[int, Row]) -> None:
        """What a step that dies half-way may leave behind."""
        if plan is not None:
            for row, start in zip(plan.rows.tolist(), plan.start.tolist(), strict=True):
                self._kv[rows[row].slots[start:]] = STATE_MODULUS

    def forget(self) -> None:
        """The cache is gone."""
        self._kv[:] = UNWRITTEN

    def _compute(self, row: Row, start: int, count: int, num_guesses: int) -> list[int]:
        """Read the context through the table, write the known tokens' states and those of all guesses but the last."""
        name, end = row.admission.request_id, start + count
        self._check(
            count > 0 and end <= len(row.tokens), f"{name}: the draft model computes {start} to {end}"
        )
        past = 0
        for token, held in zip(row.tokens[:start], self._kv[row.slots[:start]].tolist(), strict=True):
            past = next_state(past, token)
            self._check(held == past, f"{name}: the draft model's context at {start} is not its own past")
        tokens, found = row.tokens[start:end], []
        for position in range(start, end + max(0, num_guesses - 1)):
            past = next_state(past, tokens[position - start])
            self._kv[row.slots[position]] = past
            if num_guesses and position >= end - 1:
                right = self._choose(row, position + 1, past)
                found.append(right if position % 3 else (right + 1) % self._vocab_size)
                tokens.append(found[-1])
        return found
