"""BlockPool: reference counts, the free list and the prefix map of one group of KV blocks.

Each block is in exactly one of three states:

    held     ref_count > 0: in the block table of that many sequences
    cached   ref_count = 0 with a digest: free, and matchable until it is reused; then a HostTier may keep its content
    empty    ref_count = 0 without a digest: free, holds nothing that anybody may read

Free blocks (cached and empty) form one doubly linked list through the blocks themselves, reused from its head: empty
blocks first, then cached ones, least recently used first, a sequence's tail before its head. Allocating, sharing,
publishing and freeing a block are O(1); matching a prefix is O(blocks matched).

Boundary: block ids and digests. It knows neither tokens nor requests nor tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from engine.cache.host_tier import HostTier


class KVBlock:
    """One block's accounting. Written by BlockPool alone; `prev` and `next` are set only while it is free."""

    __slots__ = ("block_id", "digest", "next", "prev", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.digest: bytes | None = None
        self.prev: KVBlock | None = None
        self.next: KVBlock | None = None


class BlockPool:
    """`num_blocks` KV blocks, ids 0 … num_blocks - 1. `tier` is told of each cached block that is reused."""

    __slots__ = (
        "_blocks",
        "_by_digest",
        "_ends",
        "_matchable",
        "num_blocks",
        "num_cached",
        "num_free",
        "tier",
    )

    def __init__(self, num_blocks: int, tier: HostTier | None = None) -> None:
        assert num_blocks > 0, f"a pool needs at least one block, got {num_blocks}"
        self.num_blocks = num_blocks
        self.tier = tier
        self.num_free = num_blocks  # cached and empty blocks: what can be allocated
        self.num_cached = 0  # free blocks that can be matched
        self._blocks = [KVBlock(i) for i in range(num_blocks)]
        self._by_digest: dict[bytes, KVBlock] = {}
        self._matchable = bytearray(
            num_blocks
        )  # 1 for each block in _by_digest, for a copy of them all at once
        self._ends = KVBlock(-1)  # the list's sentinel: next is its head, prev its tail
        previous = self._ends
        for block in self._blocks:
            previous.next = block
            block.prev = previous
            previous = block
        previous.next = self._ends
        self._ends.prev = previous

    @property
    def num_published(self) -> int:
        """Matchable blocks, held or free."""
        return len(self._by_digest)

    def match(self, digests: Sequence[bytes], limit: int) -> list[int]:
        """Ids of the longest run of matchable blocks that starts `digests`, at most `limit`. Takes no reference."""
        found: list[int] = []
        lookup = self._by_digest.get
        for digest in digests[:limit]:
            block = lookup(digest)
            if block is None:
                break
            found.append(block.block_id)
        return found

    def count_free(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are free, so that sharing them would lower `num_free`."""
        blocks = self._blocks
        return sum(1 for i in block_ids if not blocks[i].ref_count)

    def share(self, block_ids: Iterable[int]) -> None:
        """Take one reference on each of these matched blocks."""
        blocks = self._blocks
        for block_id in block_ids:
            block = blocks[block_id]
            if not block.ref_count:
                assert block.digest is not None, f"block {block_id} is free and holds nothing to share"
                self._unlink(block)
                self.num_free -= 1
                self.num_cached -= 1
            block.ref_count += 1

    def allocate(self) -> int:
        """Take the free block that is cheapest to lose; what was cached in it is the tier's to keep, or gone."""
        ends = self._ends
        block = ends.next
        assert block is not ends, "no free block: check num_free first"
        assert block is not None
        following = block.next
        assert following is not None
        ends.next = following
        following.prev = ends
        block.prev = block.next = None
        digest = block.digest
        if digest is not None:
            del self._by_digest[digest]
            block.digest = None
            self._matchable[block.block_id] = 0
            self.num_cached -= 1
            if self.tier is not None:
                self.tier.keep(digest, block.block_id)
        block.ref_count = 1
        self.num_free -= 1
        return block.block_id

    def publish(self, block_id: int, digest: bytes) -> bool:
        """Make a held block matchable. False if another block already answers to this digest, which stays."""
        block = self._blocks[block_id]
        assert block.ref_count > 0, f"block {block_id} is published while nobody holds it"
        assert block.digest is None, f"block {block_id} is already published"
        if self._by_digest.setdefault(digest, block) is not block:
            return False
        block.digest = digest
        self._matchable[block_id] = 1
        return True

    def forget(self) -> tuple[int, ...]:
        """Make nothing matchable any more, here and in the tier, while nobody holds a block; ids of the blocks that were.
        O(matchable blocks)."""
        assert self.num_free == self.num_blocks, "blocks are held"
        if self.tier is not None:
            self.tier.forget()
        forgotten = tuple(block.block_id for block in self._by_digest.values())
        for block_id in forgotten:
            self._blocks[block_id].digest = None
            self._matchable[block_id] = 0
        self._by_digest.clear()
        self.num_cached = 0
        return forgotten

    def withdraw(self, block_ids: Iterable[int]) -> tuple[int, ...]:
        """Make those of these blocks that nobody holds matchable no more, here and in the tier; ids of those that were."""
        withdrawn = []
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.ref_count or block.digest is None:
                continue
            del self._by_digest[block.digest]
            if self.tier is not None:
                self.tier.drop(block.digest)
            block.digest = None
            self._matchable[block_id] = 0
            self.num_cached -= 1
            withdrawn.append(block_id)
        return tuple(withdrawn)

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back one reference on each block of a table, its tail first."""
        blocks = self._blocks
        for block_id in reversed(block_ids):
            block = blocks[block_id]
            count = block.ref_count - 1
            assert count >= 0, f"block {block_id} is released more often than it was taken"
            block.ref_count = count
            if count:
                continue
            self.num_free += 1
            if block.digest is None:
                self._link_after(self._ends, block)
            else:
                self.num_cached += 1
                tail = self._ends.prev
                assert tail is not None
                self._link_after(tail, block)

    def published_ids(self) -> frozenset[int]:
        """Every matchable block, held or free. O(matchable blocks)."""
        return frozenset(block.block_id for block in self._by_digest.values())

    def published_bits(self) -> bytes:
        """The same as one bit a block (`numpy.packbits`): a copy of num_blocks / 8 bytes, whatever is cached."""
        return np.packbits(np.frombuffer(self._matchable, np.uint8)).tobytes()

    def ref_count(self, block_id: int) -> int:
        return self._blocks[block_id].ref_count

    def is_published(self, block_id: int) -> bool:
        return self._blocks[block_id].digest is not None

    def free_ids(self) -> list[int]:
        """The free list in the order of reuse. O(free blocks)."""
        ids = []
        block = self._ends.next
        while block is not None and block is not self._ends:
            ids.append(block.block_id)
            block = block.next
        return ids

    def check_integrity(self, expected_refs: Mapping[int, int] | None = None) -> None:
        """Prove the accounting, O(blocks). `expected_refs`: references by block id; blocks not named have none.

        Raises:
            AssertionError: naming the block and what does not hold.
        """
        free = self._check_free_list()
        assert len(free) == self.num_free, (
            f"free list holds {len(free)} blocks, num_free says {self.num_free}"
        )
        cached = 0
        for block in self._blocks:
            i, count, is_free = block.block_id, block.ref_count, block.block_id in free
            assert (count == 0) == is_free, f"block {i}: ref_count {count}, in free list: {is_free}"
            if expected_refs is not None:
                assert count == expected_refs.get(i, 0), (
                    f"block {i}: ref_count {count}, tables hold {expected_refs.get(i, 0)}"
                )
            if block.digest is not None:
                assert self._by_digest.get(block.digest) is block, (
                    f"block {i}: its digest names another block"
                )
                cached += is_free
            assert bool(self._matchable[i]) == (block.digest is not None), (
                f"block {i}: its bit and its digest differ"
            )
        assert cached == self.num_cached, f"{cached} cached blocks, num_cached says {self.num_cached}"
        for digest, block in self._by_digest.items():
            assert block.digest == digest, (
                f"the prefix map names block {block.block_id} by a digest it does not have"
            )
        if self.tier is not None:
            self.tier.check_integrity()

    def _check_free_list(self) -> set[int]:
        seen: set[int] = set()
        previous = self._ends
        while (block := previous.next) is not self._ends:
            assert block is not None, f"free list ends after block {previous.block_id}"
            assert block.prev is previous, f"block {block.block_id}: prev does not point back"
            assert block.block_id not in seen, f"block {block.block_id} is in the free list twice"
            seen.add(block.block_id)
            previous = block
        assert self._ends.prev is previous, "the free list's tail is not its last block"
        return seen

    @staticmethod
    def _unlink(block: KVBlock) -> None:
        before, after = block.prev, block.next
        assert before is not None, f"block {block.block_id} is not in the free list"
        assert after is not None, f"block {block.block_id} is not in the free list"
        before.next = after
        after.prev = before
        block.prev = block.next = None

    @staticmethod
    def _link_after(before: KVBlock, block: KVBlock) -> None:
        after = before.next
        assert after is not None
        before.next = block
        block.prev = before
        block.next = after
        after.prev = block
