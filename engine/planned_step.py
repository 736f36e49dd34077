"""What the host remembers of a step in flight, and what taking it in brings.

These types stay between scheduler and engine; the device sees ``engine.plan``, the outside ``engine.records``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.decode_rows import NO_ROWS, DecodeRows
from engine.draft_progress import Drafting
from engine.plan import NO_COPIES, BlockCopies, Int32, TokenLogprobs
from engine.request import FinishReason, Sequence


@dataclass(slots=True)
class Chunk:
    """A row that computes several tokens, or one that is not its sequence's last."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    fresh: list[int]  # blocks appended to its table; empty with its admission, which names them all
    # Guesses, its last tokens; of a draft model places for them, until the step is taken in.
    drafts: list[int] = field(default_factory=list)
    num_right: int = 0  # of the drafts, once they were taken in

    @property
    def num_choices(self) -> int:
        """Tokens that are chosen for it."""
        return len(self.drafts) + 1 if self.samples else 0


@dataclass(slots=True)
class PlannedStep:
    """What the host remembers of a step in flight: whose rows it computes, in plan order."""

    step_id: int
    # Rows [0, len(decoding)) compute one token and sample; `start[i]` is the position that row i computes.
    decoding: DecodeRows = NO_ROWS
    start: Int32 = field(default_factory=lambda: NO_ROWS.rows)
    full: list[int] = field(default_factory=list)  # those of them that fill a block
    last: list[int] = field(default_factory=list)  # those that choose their sequence's last token
    chunks: list[Chunk] = field(default_factory=list)  # the other rows, in order
    # (row index, blocks appended to its table), ascending.
    growth: list[tuple[int, list[int]]] = field(default_factory=list)
    copies: BlockCopies = NO_COPIES
    drafting: Drafting | None = None  # what a draft model computes first
    num_decode_tokens: int = 0  # tokens behind the prompt, one a row
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    # (request_id, cached tokens) of those admitted that had any.
    prefix_hits: list[tuple[str, int]] = field(default_factory=list)
    # Finished or preempted since it was planned: their results are not taken.
    dropped: set[Sequence] = field(default_factory=set)

    @property
    def num_tokens(self) -> int:
        return len(self.decoding) + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_draft_tokens(self) -> int:
        return sum(len(chunk.drafts) for chunk in self.chunks)

    def rows(self) -> tuple[tuple[str, int], ...]:
        """(request_id, num_tokens) of each row, in plan order."""
        rows = self.decoding.cohort.rows
        if self.chunks:
            rows += tuple([(chunk.seq.request_id, chunk.num_tokens) for chunk in self.chunks])
        return rows

    def sampling(self) -> list[Sequence]:
        """Whose tokens are chosen, in the order of the result's tokens."""
        several = [chunk.seq for chunk in self.chunks for _ in range(chunk.num_choices)]
        return [*self.decoding.sequences, *several]

    def sequences(self) -> Iterator[Sequence]:
        yield from self.decoding.sequences
        for chunk in self.chunks:
            yield chunk.seq


@dataclass(slots=True)
class Finish:
    """A sequence that ended in a commit."""

    seq: Sequence
    reason: FinishReason
    stop_reason: int | None = None
    has_token: bool = True  # False: it was only scored


@dataclass(slots=True)
class PromptLogprobs:
    """What one chunk said about the prompt tokens from position `first` on."""

    seq: Sequence
    first: int
    entries: list[TokenLogprobs]


@dataclass(slots=True)
class PooledPart:
    """What the chunk from position `start` on adds to its sequence's pooled vector."""

    seq: Sequence
    start: int
    values: NDArray[np.float64]


@dataclass(slots=True)
class Commit:
    """What a committed step added. `token_ids[i]` is a new token of `sequences[i]`; those that decoded come first.

    A sequence whose guesses were right has several, side by side.
    """

    step: PlannedStep
    decoding: DecodeRows = NO_ROWS
    sequences: list[Sequence] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: list[Finish] = field(default_factory=list)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)  # by request_id: of its tokens
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    pooled: list[PooledPart] = field(default_factory=list)
    num_accepted_tokens: int = 0  # guesses that were right
