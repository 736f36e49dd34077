"""KV waste: the share of places in held blocks that no token has, from step records."""

from __future__ import annotations

from collections.abc import Sequence

from engine.records import StepRecord


def kv_waste(
    steps: Sequence[StepRecord], num_blocks: int, block_size: int, *, last: int | None = None
) -> float:
    """Mean over the `last` steps (None: all), weighted by what was held. `steps` begin with the engine idle.

    Held blocks are those that cannot be allocated; tokens are those that steps so far have computed or been planned to. A
    record's count of free blocks is from its end, when a later step may be planned and have its blocks: that step's tokens count.
    Prompts share no blocks here; shared tokens would count once for each holder.
    """
    tokens: dict[str, int] = {}
    planned = 0
    held = used = 0
    first = len(steps) - (len(steps) if last is None else last)
    for i, step in enumerate(steps):
        while planned < len(steps) and steps[planned].started_ns < step.ended_ns:
            _plan(tokens, steps[planned])
            planned += 1
        for request_id in step.finished:
            tokens.pop(request_id, None)
        if i >= first:
            held += (num_blocks - step.num_free_blocks) * block_size
            used += sum(tokens.values())
    return 1.0 - used / held if held else 0.0


def _plan(tokens: dict[str, int], step: StepRecord) -> None:
    for request_id in step.preempted:
        tokens.pop(request_id, None)
    for request_id, cached in step.prefix_hits:
        tokens[request_id] = cached
    for request_id, count in step.rows:
        tokens[request_id] = tokens.get(request_id, 0) + count
