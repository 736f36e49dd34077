"""DecodeRows: the sequences that compute one token each in a step, and what is derived from them once for many steps.

While nobody comes or goes, the same sequences decode step after step: what a step would make of each of them anew (row
numbers, names) is made once and shared. Boundary: who decodes is decided in ``engine.scheduler``.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.plan import Int32
from engine.records import Cohort
from engine.request import Sequence

_Item = TypeVar("_Item")


class DecodeRows:
    """Sequences in order of admission, and their rows. Immutable: when somebody comes or goes, there is another one."""

    __slots__ = ("_cohort", "index", "rows", "sequences", "token_ids")

    def __init__(self, sequences: list[Sequence], index: NDArray[np.intp] | None = None) -> None:
        self.sequences = sequences
        self.token_ids = [seq.token_ids for seq in sequences]
        # Row numbers as NumPy indexes fastest, and as plans have them. Kept although the sequences know them: one that leaves
        # gives its row to another.
        self.index = np.array([seq.row for seq in sequences], np.intp) if index is None else index
        self.rows: Int32 = self.index.astype(np.int32)
        self._cohort: Cohort | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def cohort(self) -> Cohort:
        """The same requests as the outside sees them."""
        if self._cohort is None:
            self._cohort = Cohort(
                tuple([seq.request.request_id for seq in self.sequences]),
                tuple([seq.num_cached_tokens for seq in self.sequences]),
            )
        return self._cohort

    def without(self, positions: list[int]) -> DecodeRows:
        """The others; `positions` ascending."""
        if not positions:
            return self
        return DecodeRows(without(self.sequences, positions), np.delete(self.index, positions))


def without(items: list[_Item], positions: list[int]) -> list[_Item]:
    """A copy that lacks the items at these positions, which ascend."""
    kept = items.copy()
    for i in reversed(positions):
        del kept[i]
    return kept


NO_ROWS = DecodeRows([])
