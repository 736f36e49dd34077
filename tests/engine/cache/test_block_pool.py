"""BlockPool: who gets which block, what stays matchable, and that wrong accounting is noticed."""

from __future__ import annotations

import pytest

from engine.cache.block_pool import BlockPool


def take(pool: BlockPool, count: int) -> list[int]:
    return [pool.allocate() for _ in range(count)]


def digest(i: int) -> bytes:
    return i.to_bytes(16, "big")


def publish(pool: BlockPool, blocks: list[int], first: int = 0) -> list[bytes]:
    digests = [digest(first + i) for i in range(len(blocks))]
    for block, name in zip(blocks, digests, strict=True):
        assert pool.publish(block, name)
    return digests


def test_every_block_is_given_once_and_then_there_is_none() -> None:
    pool = BlockPool(4)
    assert sorted(take(pool, 4)) == [0, 1, 2, 3]
    assert pool.num_free == 0
    with pytest.raises(AssertionError, match="no free block"):
        pool.allocate()


def test_freed_blocks_stay_matchable_until_they_are_reused() -> None:
    pool = BlockPool(3)
    blocks = take(pool, 2)
    digests = publish(pool, blocks)
    pool.release(blocks)
    assert pool.match(digests, 9) == blocks
    assert (pool.num_free, pool.num_cached) == (3, 2)
    take(pool, 3)
    assert pool.match(digests, 9) == []
    assert pool.num_published == 0


def test_blocks_that_hold_nothing_are_reused_before_cached_ones() -> None:
    pool = BlockPool(4)
    cached, scratch = take(pool, 2), take(pool, 2)
    publish(pool, cached)
    pool.release(cached)
    pool.release(scratch)
    assert set(take(pool, 2)) == set(scratch)


def test_the_tail_of_a_sequence_is_lost_before_its_head() -> None:
    pool = BlockPool(3)
    blocks = take(pool, 3)
    digests = publish(pool, blocks)
    pool.release(blocks)
    assert pool.free_ids() == blocks[::-1]
    pool.allocate()
    assert pool.match(digests, 9) == blocks[:2]


def test_the_least_recently_used_sequence_is_lost_first() -> None:
    pool = BlockPool(4)
    old, new = take(pool, 2), take(pool, 2)
    old_digests, new_digests = publish(pool, old), publish(pool, new, 10)
    pool.release(old)
    pool.release(new)
    pool.share(old)  # used again: now the more recent one
    pool.release(old)
    take(pool, 2)
    assert pool.match(new_digests, 9) == []
    assert pool.match(old_digests, 9) == old


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    pool = BlockPool(2)
    blocks = take(pool, 1)
    publish(pool, blocks)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)


def test_a_match_stops_at_the_first_gap_and_at_the_limit() -> None:
    pool = BlockPool(4)
    blocks = take(pool, 3)
    digests = publish(pool, blocks)
    assert pool.match(digests, 2) == blocks[:2]
    assert pool.match([digests[0], digest(99), digests[2]], 9) == blocks[:1]


def test_the_first_block_under_a_digest_stays_and_a_twin_stays_unmatchable() -> None:
    pool = BlockPool(2)
    first, twin = take(pool, 2)
    assert pool.publish(first, digest(1))
    assert not pool.publish(twin, digest(1))
    pool.release([twin])
    assert pool.match([digest(1)], 1) == [first]
    pool.check_integrity({first: 1})


def test_only_held_blocks_can_be_published_and_only_once() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.publish(0, digest(1))
    block = pool.allocate()
    pool.publish(block, digest(1))
    with pytest.raises(AssertionError, match="already published"):
        pool.publish(block, digest(2))


@pytest.mark.parametrize("damage", ["ref_count", "num_free", "num_cached", "digest", "prev", "map"])
def test_check_integrity_notices_damage(damage: str) -> None:
    pool = BlockPool(4)
    held, freed = take(pool, 1), take(pool, 1)
    publish(pool, freed)
    pool.release(freed)
    pool.check_integrity({held[0]: 1})
    match damage:
        case "ref_count":
            pool._blocks[held[0]].ref_count = 2
        case "num_free":
            pool.num_free += 1
        case "num_cached":
            pool.num_cached = 0
        case "digest":
            pool._blocks[freed[0]].digest = digest(7)
        case "prev":
            pool._blocks[freed[0]].prev = pool._blocks[held[0]]
        case "map":
            pool._by_digest[digest(5)] = pool._blocks[held[0]]
    with pytest.raises(AssertionError):
        pool.check_integrity({held[0]: 1})
