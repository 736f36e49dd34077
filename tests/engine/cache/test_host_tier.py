"""A pool with a host tier against a brute-force model: what is where, and what each copy moves.

The model keeps real contents: a name in each block and slot, moved by the copies when a step takes them. A copy of the wrong
or of a reused place makes a sequence find another's name.
"""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.block_pool import BlockPool
from engine.cache.host_tier import HostTier
from engine.plan import NO_COPIES, BlockCopies

MAX_INFLIGHT = 2


class TierMachine(RuleBasedStateMachine):
    """Sequences come with a word; block i of a sequence is named by the word's first i + 1 letters."""

    @initialize(num_blocks=st.integers(1, 6), num_slots=st.integers(1, 6))
    def start(self, num_blocks: int, num_slots: int) -> None:
        self.tier = HostTier(num_slots)
        self.pool = BlockPool(num_blocks, self.tier)
        self.blocks: list[bytes | None] = [None] * num_blocks  # contents, as the device will have them
        self.slots: list[bytes | None] = [None] * num_slots
        self.inflight: deque[BlockCopies] = deque()
        self.tables: list[list[int]] = []
        # The model: names that slots hold, least recently used first; those being read keep their places.
        self.kept: list[bytes] = []

    def reads(self) -> list[bytes]:
        return [
            name for copies in self.inflight for s in copies.back[:, 0].tolist() if (name := self.slots[s])
        ]

    def evict(self, name: bytes, reading: list[bytes]) -> None:
        """The model's `keep`."""
        if name in self.kept or name in reading:
            if name in self.kept:
                self.kept.append(self.kept.pop(self.kept.index(name)))
            return
        if len(self.kept) + len(set(reading)) == self.tier.num_slots:
            if not self.kept:
                return
            self.kept.pop(0)
        self.kept.append(name)

    @precondition(lambda self: len(self.inflight) < MAX_INFLIGHT)
    @rule(word=st.text("ab", min_size=1, max_size=5))
    def step(self, word: str) -> None:
        """A sequence comes, and a step brings and computes its blocks; they are published as they are taken."""
        names = [word[: i + 1].encode() for i in range(len(word))]
        matched = self.pool.match(names, len(names))
        reading = self.reads()
        found = []
        for name in names[len(matched) :]:
            slot = self.tier.find(name)
            assert (slot is not None) == (name in self.kept or name in reading), (
                f"{name!r} is found where it is not"
            )
            if slot is None:
                break
            found.append(slot)
        if len(names) - len(matched) > self.pool.num_free - self.pool.count_free(matched):
            return
        self.pool.share(matched)
        self.tier.hold(found)
        brought = names[len(matched) : len(matched) + len(found)]
        self.kept = [name for name in self.kept if name not in brought]
        fresh = []
        for _ in names[len(matched) :]:
            victim = next(iter(self.pool.free_ids()))
            if self.pool.is_published(victim):
                name = self.blocks[victim]
                assert name is not None
                self.evict(name, reading + brought)
            fresh.append(self.pool.allocate())
        self.tier.bring(found, fresh[: len(found)])
        copies = self.tier.take_copies()
        self.make(copies)
        self.inflight.append(copies)
        table = matched + fresh
        assert [self.blocks[b] for b in table[: len(matched) + len(found)]] == names[
            : len(matched) + len(found)
        ]
        for block, name in zip(fresh[len(found) :], names[len(matched) + len(found) :], strict=True):
            self.blocks[block] = name
        for block, name in zip(fresh, names[len(matched) :], strict=True):
            self.pool.publish(block, name)
        self.tables.append(table)

    def make(self, copies: BlockCopies) -> None:
        """What the device does: all of `out`, then all of `back`. A slot that a step in flight reads is not written."""
        filled = copies.out[:, 1].tolist()
        assert len(set(filled)) == len(filled)
        read = {slot for earlier in self.inflight for slot in earlier.back[:, 0].tolist()}
        assert read.isdisjoint(filled), "a slot is written while it is read"
        for block, slot in copies.out.tolist():
            self.slots[slot] = self.blocks[block]
        for slot, block in copies.back.tolist():
            self.blocks[block] = self.slots[slot]

    @precondition(lambda self: self.inflight)
    @rule()
    def collect(self) -> None:
        copies = self.inflight.popleft()
        names = [self.slots[slot] for slot in copies.back[:, 0].tolist()]
        self.tier.release(copies)
        self.kept += [name for name in names if name is not None and name not in self.reads()]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end_sequence(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @precondition(lambda self: self.inflight)
    @rule()
    def fail(self) -> None:
        """All steps in flight are forgotten: their slots hold nothing any more."""
        lost = {slot for copies in self.inflight for slot in copies.out[:, 1].tolist()}
        read = [name for name in dict.fromkeys(self.reads()) if self.slots.index(name) not in lost]
        self.tier.withdraw(self.inflight)
        self.inflight.clear()
        withdrawn = [self.slots[slot] for slot in lost]
        self.kept = [name for name in self.kept if name not in withdrawn] + read
        for slot in lost:
            self.slots[slot] = None

    @invariant()
    def accounting_holds(self) -> None:
        if not hasattr(self, "tier"):
            return
        self.pool.check_integrity()
        held = {*self.kept, *self.reads()}
        assert self.tier.num_cached == len(held) <= self.tier.num_slots
        for name in held:
            slot = self.tier.find(name)
            assert slot is not None
            assert self.slots[slot] == name, "a slot holds another block than it is known for"


TierMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestTierMachine = TierMachine.TestCase


def fill(tier: HostTier, *names: bytes) -> BlockCopies:
    """Blocks 0, 1, … leave the pool in one step."""
    for block, name in enumerate(names):
        tier.keep(name, block)
    return tier.take_copies()


def test_the_least_recently_used_slot_is_given_on() -> None:
    tier = HostTier(2)
    assert fill(tier, b"x", b"y").out.tolist() == [[0, 0], [1, 1]]
    assert fill(tier, b"x") is NO_COPIES, "what a slot has needs no copy"
    assert fill(tier, b"z").out.tolist() == [[0, 1]]
    assert (tier.find(b"x"), tier.find(b"y"), tier.find(b"z")) == (0, None, 1)


def test_a_slot_given_on_within_a_step_is_written_once() -> None:
    tier = HostTier(1)
    assert fill(tier, b"x", b"y", b"z").out.tolist() == [[2, 0]]
    assert tier.num_cached == 1


def test_a_slot_that_is_read_keeps_its_content_until_the_step_is_collected() -> None:
    tier = HostTier(1)
    fill(tier, b"x")
    tier.hold([0])
    tier.bring([0], [5])
    copies = tier.take_copies()
    assert copies.back.tolist() == [[0, 5]]
    assert fill(tier, b"y") is NO_COPIES
    assert (tier.find(b"x"), tier.find(b"y")) == (0, None)
    tier.release(copies)
    assert fill(tier, b"y").out.tolist() == [[0, 0]]
    tier.check_integrity()


def test_what_a_failed_step_should_have_saved_is_withdrawn() -> None:
    tier = HostTier(3)
    fill(tier, b"old")
    lost = [fill(tier, b"x", b"y")]
    tier.hold([0])
    tier.bring([0], [4])
    lost.append(tier.take_copies())
    tier.withdraw(lost)
    assert [tier.find(name) for name in (b"old", b"x", b"y")] == [0, None, None]
    tier.check_integrity()


def test_a_slot_released_too_often_is_a_bug_that_is_named() -> None:
    tier = HostTier(1)
    fill(tier, b"x")
    tier.hold([0])
    tier.bring([0], [1])
    copies = tier.take_copies()
    tier.release(copies)
    with pytest.raises(AssertionError, match="slot 0 is released"):
        tier.release(copies)
