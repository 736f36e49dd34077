"""LoraQueue: which adapters may share a batch, and in which slot each of them is.

A batch holds at most `max_loras` different adapters. A waiting sequence whose adapter has no slot waits until one is free;
to make sure that one becomes free, the adapters that have run longest take no new sequences as long as somebody waits for
a slot, as many of them as there are adapters that wait. So every adapter's turn comes, and the others run on. An adapter
keeps its slot when its last sequence leaves, until the slot is needed: least recently used first.

Boundary: numbers only; what a slot holds is the runner's to see to, by the adapter's number in the admission.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from itertools import islice


class LoraQueue:
    """Adapters of the live sequences of one scheduler."""

    def __init__(self, max_loras: int) -> None:
        self.max_loras = max_loras
        self._live: Counter[int] = Counter()  # live sequences of each adapter
        # Sequences with a row of each adapter, the adapters in order of coming in
        self._running: dict[int, int] = {}
        # The slot of each adapter that has one, least recently used first.
        self._slots: OrderedDict[int, int] = OrderedDict()
        # Adapters without a slot that somebody in the queue was seen to wait for.
        self._claims: set[int] = set()

    def num_live(self, lora_id: int) -> int:
        """Live sequences that carry the adapter."""
        return self._live[lora_id]

    def begin(self, lora_id: int) -> None:
        """A sequence of this adapter came."""
        self._live[lora_id] += 1

    def end(self, lora_id: int) -> None:
        """A sequence of this adapter ended."""
        self._live[lora_id] -= 1
        if not self._live[lora_id]:
            del self._live[lora_id]

    def forget_claims(self) -> None:
        """The queue is asked anew from its head."""
        self._claims.clear()

    def admits(self, lora_id: int) -> bool:
        """Whether a waiting sequence of this adapter may run now. Sequences ask in the queue's order."""
        if lora_id in self._running:
            return lora_id not in islice(self._running, len(self._claims))
        if len(self._running) < self.max_loras:
            return True
        self._claims.add(lora_id)
        return False

    def enter(self, lora_id: int) -> int:
        """A sequence of this adapter takes a row; returns its slot."""
        self._running[lora_id] = self._running.get(lora_id, 0) + 1
        if lora_id not in self._slots:
            assert len(self._running) <= self.max_loras, f"{len(self._running)} adapters at once"
            self._slots[lora_id] = self._free_slot()
        self._slots.move_to_end(lora_id)
        return self._slots[lora_id]

    def leave(self, lora_id: int) -> None:
        """A sequence of this adapter gives its row back."""
        self._running[lora_id] -= 1
        if not self._running[lora_id]:
            del self._running[lora_id]

    def check_integrity(self, live: Counter[int], running: Counter[int]) -> None:
        """Prove the counts.

        Raises:
            AssertionError: naming what does not hold.
        """
        assert self._live == live, f"live {self._live}, counted {live}"
        assert self._running == running, f"running {self._running}, counted {running}"
        assert len(running) <= self.max_loras, f"{len(running)} adapters at once"
        slots = list(self._slots.values())
        assert len(set(slots)) == len(slots) <= self.max_loras, f"slots {slots}"
        assert running.keys() <= self._slots.keys(), "an adapter runs without a slot"

    def _free_slot(self) -> int:
        if len(self._slots) < self.max_loras:
            return len(self._slots)
        unused = next(lora_id for lora_id in self._slots if lora_id not in self._running)
        return self._slots.pop(unused)
