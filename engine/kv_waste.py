"""KV waste: the share of the held blocks' bytes that no token uses, from the step records.

Blocks are handed out whole, so that a sequence of n tokens leaves ``-n mod block_size`` slots of its last block empty: half a
block on average, whatever n. Blocks that sequences share are full and count once.

Boundary: arithmetic over records. What a sliding window will not read again, and what is cached for nobody, is no waste here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.records import BlockEventKind, StepRecord


@dataclass(frozen=True, slots=True)
class KVWaste:
    """Slots (bytes over bytes a token), added up over steps: every step weighs as much as it holds."""

    held_slots: int
    empty_slots: int

    @property
    def share(self) -> float:
        """Empty among held ones; 0 where nothing was held."""
        return self.empty_slots / self.held_slots if self.held_slots else 0.0


def kv_waste(
    records: Sequence[StepRecord], *, num_blocks: int, block_size: int, last: int | None = None
) -> KVWaste:
    """The waste of the `last` of these steps (None: all), in a row from the engine's first or from one before which nothing ran.

    A step counts with all tokens that were planned when it ended: their blocks are held, and being written.
    """
    tables: dict[str, int] = {}  # blocks of each running request
    tokens: dict[str, int] = {}
    held = empty = planned = 0
    first = len(records) - (len(records) if last is None else last)
    for number, record in enumerate(records):
        for event in record.block_events:
            if event.kind is BlockEventKind.RELEASE:
                tables.pop(event.request_id, None)
                tokens.pop(event.request_id, None)
            elif event.kind is not BlockEventKind.PUBLISH:
                tables[event.request_id] = tables.get(event.request_id, 0) + len(event.block_ids)
                shared = len(event.block_ids) if event.kind is BlockEventKind.SHARE else 0
                tokens[event.request_id] = tokens.get(event.request_id, 0) + shared * block_size
        while planned < len(records) and records[planned].started_ns < record.ended_ns:
            for request_id, num_tokens in records[planned].rows:
                if request_id in tables:  # else it ended, or was preempted, under this step
                    tokens[request_id] += num_tokens
            planned += 1
        if number < first:
            continue
        held += (num_blocks - record.num_free_blocks) * block_size
        empty += sum(tables.values()) * block_size - sum(tokens.values())
    return KVWaste(held, empty)
