"""HostTier: which host slot keeps the content of which KV block that the pool gave up, and the copies that a step makes.

Each slot is in exactly one of three states:

    free   holds nothing
    kept   holds the block of one digest, and nobody reads it: least recently used first, it is given to another block
    read   the same, but a step that has not been collected copies from it: its content stays

A block that comes back keeps its slot, so that leaving the pool again costs no second copy. Everything is O(1) a block.

A slot counts as filled once the copy to it is planned: copies run in the order of the steps, so whoever reads it comes
later. If a step fails, what it and the steps behind it should have copied is withdrawn.

Boundary: slots, block ids and digests. The bytes, and the order of copies on the device, are
``engine.runner.host_blocks``'s; when a step is over is the scheduler's to say.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from engine.plan import NO_COPIES, BlockCopies, Int32


class HostTier:
    """`num_slots` host blocks, slots 0 … num_slots - 1."""

    __slots__ = ("_back", "_digests", "_free", "_kept", "_num_readers", "_out", "_slots", "num_slots")

    def __init__(self, num_slots: int) -> None:
        assert num_slots > 0, f"a host tier needs at least one slot, got {num_slots}"
        self.num_slots = num_slots
        self._slots: dict[bytes, int] = {}
        self._digests: list[bytes | None] = [None] * num_slots
        self._num_readers = [0] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        # Copies of the next step. By slot: one that is given on before the step is made is written once.
        self._out: dict[int, int] = {}
        self._back: list[tuple[int, int]] = []

    @property
    def num_cached(self) -> int:
        """Slots that hold a block."""
        return len(self._slots)

    def find(self, digest: bytes) -> int | None:
        """The slot that holds the block of this digest."""
        return self._slots.get(digest)

    def keep(self, digest: bytes, block_id: int) -> None:
        """The pool gives `block_id` up: its content goes to a slot with the next step, unless one has it already.

        With every slot being read it is lost.
        """
        slot = self._slots.get(digest)
        if slot is not None:
            if slot in self._kept:
                self._kept.move_to_end(slot)
            return
        if self._free:
            slot = self._free.pop()
        elif self._kept:
            slot, _ = self._kept.popitem(last=False)
            self._forget(slot)
        else:
            return
        self._slots[digest] = slot
        self._digests[slot] = digest
        self._kept[slot] = None
        self._out[slot] = block_id

    def hold(self, slots: Iterable[int]) -> None:
        """The next step reads these slots: they keep their content until `release`."""
        for slot in slots:
            assert self._digests[slot] is not None, f"slot {slot} is read and holds nothing"
            self._num_readers[slot] += 1
            self._kept.pop(slot, None)

    def bring(self, slots: Iterable[int], block_ids: Iterable[int]) -> None:
        """The next step copies these held slots, each to its block of the pool."""
        self._back.extend(zip(slots, block_ids, strict=True))

    def take_copies(self) -> BlockCopies:
        """The copies since the last call; from now on they belong to a step in flight."""
        if not self._out and not self._back:
            return NO_COPIES
        out = [(block, slot) for slot, block in self._out.items()]
        copies = BlockCopies(_pairs(out), _pairs(self._back))
        self._out.clear()
        self._back.clear()
        return copies

    def release(self, copies: BlockCopies) -> None:
        """The step with these copies reads no more."""
        for slot in copies.back[:, 0].tolist():
            self._num_readers[slot] -= 1
            assert self._num_readers[slot] >= 0, f"slot {slot} is released more often than it was held"
            if not self._num_readers[slot]:
                self._kept[slot] = None

    def withdraw(self, lost: Iterable[BlockCopies]) -> None:
        """All steps in flight are forgotten, after a failure: what their copies should have put into slots is not there."""
        lost = list(lost)
        for copies in lost:
            self.release(copies)
        for slot in {slot for copies in lost for slot in copies.out[:, 1].tolist()}:
            del self._kept[slot]
            self._forget(slot)
            self._free.append(slot)

    def drop(self, digest: bytes) -> None:
        """Hold the block of this digest no more, unless a step reads it."""
        slot = self._slots.get(digest)
        if slot is not None and slot in self._kept:
            del self._kept[slot]
            self._out.pop(slot, None)
            self._forget(slot)
            self._free.append(slot)

    def forget(self) -> None:
        """Hold nothing any more, with no step in flight: the memory behind the slots goes."""
        assert not self._back, "blocks are to be brought back"
        assert not any(self._num_readers), "slots are being read"
        self._out.clear()
        self._kept.clear()
        for slot in list(self._slots.values()):
            self._forget(slot)
            self._free.append(slot)

    def check_integrity(self) -> None:
        """Prove the accounting, O(slots).

        Raises:
            AssertionError: naming the slot and what does not hold.
        """
        free = set(self._free)
        assert len(free) == len(self._free), f"a slot is free twice: {sorted(self._free)}"
        for slot in range(self.num_slots):
            digest, is_read = self._digests[slot], self._num_readers[slot] > 0
            assert (digest is None) == (slot in free), f"slot {slot}: free {slot in free}, digest {digest!r}"
            assert (slot in self._kept) == (digest is not None and not is_read), (
                f"slot {slot}: kept {slot in self._kept}, {self._num_readers[slot]} readers"
            )
            if digest is None:
                assert not is_read, f"slot {slot} is read and holds nothing"
            else:
                assert self._slots.get(digest) == slot, f"slot {slot}: its digest names another"
        assert len(self._slots) + len(free) == self.num_slots, "a digest names a slot that does not hold it"

    def _forget(self, slot: int) -> None:
        digest = self._digests[slot]
        assert digest is not None, f"slot {slot} holds nothing"
        del self._slots[digest]
        self._digests[slot] = None


def _pairs(pairs: list[tuple[int, int]]) -> Int32:
    return np.array(pairs, np.int32).reshape(-1, 2)
