"""BlockPool against a brute-force model: a list of free blocks, a dict of owners, a dict of digests."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.block_pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Sequences come with a word; block i of a sequence is named by the word's first i + 1 letters."""

    @initialize(num_blocks=st.integers(1, 7))
    def start(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.pool = BlockPool(num_blocks)
        self.tables: dict[int, list[int]] = {}
        self.words: dict[int, str] = {}
        self.num_published: dict[int, int] = {}
        self.next_id = 0
        # The model: free blocks in order of reuse, and what each block is known as.
        self.free = list(range(num_blocks))
        self.names: dict[int, bytes] = {}

    def name(self, word: str, i: int) -> bytes:
        return word[: i + 1].encode()

    def model_allocate(self) -> int:
        block = self.free.pop(0)
        self.names.pop(block, None)
        return block

    @rule(word=st.text("ab", min_size=1, max_size=5))
    def start_sequence(self, word: str) -> None:
        digests = [self.name(word, i) for i in range(len(word))]
        matched = self.pool.match(digests, len(word))
        by_name = {name: block for block, name in self.names.items()}
        expected = []
        for digest in digests:
            if digest not in by_name:
                break
            expected.append(by_name[digest])
        assert matched == expected
        num_free_matched = sum(block in self.free for block in matched)
        assert self.pool.count_free(matched) == num_free_matched
        if len(word) - len(matched) > len(self.free) - num_free_matched:
            return
        self.pool.share(matched)
        self.free = [block for block in self.free if block not in matched]
        table = matched + [self.pool.allocate() for _ in range(len(word) - len(matched))]
        assert table == matched + [self.model_allocate() for _ in range(len(word) - len(matched))]
        self.tables[self.next_id], self.words[self.next_id] = table, word
        self.num_published[self.next_id] = len(matched)
        self.next_id += 1

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish_one(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.tables)))
        i = self.num_published[key]
        if i == len(self.tables[key]):
            return
        self.num_published[key] += 1
        block, name = self.tables[key][i], self.name(self.words[key], i)
        is_new = name not in self.names.values()
        assert self.pool.publish(block, name) == is_new
        if is_new:
            self.names[block] = name

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end_sequence(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.tables)))
        table = self.tables.pop(key)
        self.pool.release(table)
        for block in reversed(table):
            if any(block in other for other in self.tables.values()):
                continue
            if block in self.names:
                self.free.append(block)
            else:
                self.free.insert(0, block)

    @invariant()
    def accounting_holds(self) -> None:
        if not hasattr(self, "pool"):
            return
        refs = Counter(block for table in self.tables.values() for block in table)
        self.pool.check_integrity(refs)
        assert self.pool.free_ids() == self.free
        assert self.pool.num_free == len(self.free)
        assert self.pool.num_cached == sum(block in self.names for block in self.free)
        assert self.pool.published_ids() == frozenset(self.names)
        bits = np.unpackbits(np.frombuffer(self.pool.published_bits(), np.uint8))
        assert set(np.flatnonzero(bits).tolist()) == set(self.names)
        assert all(self.pool.ref_count(block) == refs[block] for block in range(self.num_blocks))


PoolMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestPoolMachine = PoolMachine.TestCase
