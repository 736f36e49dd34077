"""LongPrefill: what others get of each step while one prompt takes many steps to read.

While somebody waits, half of what the decoding sequences leave of a step's budget is kept for prompts with less before them than
the long one has; what they do not use is the long one's, so that steps are full either way. They begin in the queue's order,
and the last that begins in a step may need more steps: it *overtakes*, and has half of the budget until it is read. It is always
read before the long one, which stays at the end of the running list: of the prefills that are not over there are two at most
(vLLM's ``max_num_partial_prefills=2``, ``max_long_partial_prefills=1``).

Nobody starves. The long one gets a token at least for each step in which somebody overtakes it, so it takes about twice its steps
at most. Who begins leaves it the blocks for all of its prompt; if it loses them all the same, to sequences that grew, it is not
overtaken again. A later priority never overtakes.

Boundary: counts. Who waits, and whose blocks are free, the scheduler tells.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.request import Sequence


@dataclass(frozen=True, slots=True)
class LongPrefill:
    """The prefill at the end of the running list, in one step. `budget`: tokens that the step has for prefills."""

    seq: Sequence
    num_left: int  # tokens of it that have not been scheduled
    budget: int

    @property
    def num_kept(self) -> int:
        """Tokens of the step that are for others first."""
        return (self.budget + 1) // 2

    def lets_pass(self, other: Sequence, num_tokens: int, budget: int) -> bool:
        """Whether `other`, with `num_tokens` to compute, may begin with up to `budget` of them now, and is read first."""
        num_behind = max(0, num_tokens - budget)
        is_read_first = not num_behind or num_behind <= self.num_left - self.budget // 2
        return (
            is_read_first
            and num_tokens < self.num_left
            and other.request.priority <= self.seq.request.priority
        )


def find(
    running: list[Sequence], lefts: list[int], budget: int, *, somebody_waits: bool
) -> LongPrefill | None:
    """The prefill that others go before in this step. `lefts`: tokens not scheduled of the last two that run, 0 when they decode."""
    num_left = lefts[-1] if lefts else 0
    if num_left <= 0 or not budget:
        return None
    is_overtaken = len(lefts) > 1 and lefts[-2] > 0
    may_be = somebody_waits and budget > 1 and num_left > budget and not running[-1].num_preemptions
    return LongPrefill(running[-1], num_left, budget) if is_overtaken or may_be else None
