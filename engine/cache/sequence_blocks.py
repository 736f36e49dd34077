"""SequenceBlocks: the block tables of sequences, on top of one BlockPool, and the events that tell of them.

It knows when a sequence's blocks may be matched by others: when their tokens are known and the step that computed them
was committed. Until then their digests are *announced*: a sequence that would compute the same block can wait for it.

Boundary: it reads a Sequence's tokens and writes its `block_ids` and `block_hashes`; when to call what is the scheduler's
decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.cache.block_hash import block_digest, extend_chain, root_digest
from engine.cache.block_pool import BlockPool
from engine.cache.host_tier import HostTier
from engine.plan import NO_COPIES, BlockCopies
from engine.records import BlockEvent, BlockEventKind
from engine.request import Request, Sequence, SequenceStatus

ACQUIRE, SHARE, PUBLISH, RELEASE = (
    BlockEventKind.ACQUIRE,
    BlockEventKind.SHARE,
    BlockEventKind.PUBLISH,
    BlockEventKind.RELEASE,
)


NOBODY = ""  # the request of events that no request caused


@dataclass(frozen=True, slots=True)
class Match:
    """Where the KV of a sequence's beginning is: in blocks of the pool, then in slots of its host tier."""

    blocks: list[int]
    slots: list[int]

    def __len__(self) -> int:
        return len(self.blocks) + len(self.slots)


class SequenceBlocks:
    """Gives blocks to sequences, shares those that match, takes them back.

    `events` grows by one entry per change; whoever records steps takes the list with `take_events`.
    """

    __slots__ = (
        "_announced",
        "_awaited",
        "_enabled",
        "_roots",
        "_version_digest",
        "block_size",
        "events",
        "pool",
    )

    def __init__(
        self, pool: BlockPool, block_size: int, *, version_digest: str, enable_prefix_cache: bool
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.events: list[BlockEvent] = []
        self._enabled = enable_prefix_cache
        self._version_digest = version_digest
        self._announced: dict[bytes, Sequence] = {}  # digest of a block being computed -> who computes it
        self._awaited: dict[Sequence, bytes] = {}  # who waits for one of those
        self._roots: dict[tuple[str, str], bytes] = {}  # by salt and adapter

    def match(self, seq: Sequence) -> Match:
        """What is known of the beginning of `seq`, leaving at least one token to compute."""
        if not self._enabled:
            return Match([], [])
        limit = self._most_matched(seq)
        self._hash_until(seq, limit)
        blocks = self.pool.match(seq.block_hashes, limit)
        tier = self.pool.tier
        if tier is None:
            return Match(blocks, [])
        return Match(blocks, self._match_host(tier, seq.block_hashes[len(blocks) : limit]))

    def _match_host(self, tier: HostTier, digests: list[bytes]) -> list[int]:
        """Slots of the longest run that starts `digests`, up to a block that a running sequence brings or computes."""
        slots: list[int] = []
        for digest in digests:
            slot = tier.find(digest)
            if slot is None or digest in self._announced:
                break  # an announced one is awaited: a second copy of it would take a second block
            slots.append(slot)
        return slots

    def awaits(self, seq: Sequence) -> bool:
        """Whether blocks that `seq` was found to await (`look_out`) are still being computed. O(1)."""
        return self._awaited.get(seq) in self._announced

    def look_out(self, seq: Sequence, num_matched: int) -> bool:
        """Whether a running sequence is computing the blocks that `seq` needs after its `num_matched` matched ones.

        If so, `seq` awaits the last of them: having the whole common prefix costs least.
        """
        self._awaited.pop(seq, None)
        if not self._enabled:
            return False
        for digest in seq.block_hashes[num_matched : self._most_matched(seq)]:
            if digest not in self._announced:
                break
            self._awaited[seq] = digest
        return seq in self._awaited

    def admit(self, seq: Sequence, match: Match, num_tokens: int) -> None:
        """Start the table of `seq`: the matched blocks, then fresh ones up to `num_tokens` tokens.

        The first of the fresh ones take what was matched in the host tier; they are published with what `seq` computes.
        """
        assert not seq.block_ids, f"{seq.request_id} already has blocks"
        matched = match.blocks
        if matched:
            self.pool.share(matched)
            seq.block_ids.extend(matched)
            self.events.append(BlockEvent(SHARE, seq.request_id, tuple(matched)))
        if self._enabled:
            self._hash_until(seq, len(seq.token_ids) // self.block_size)
            for digest in seq.block_hashes[len(matched) :]:
                self._announced.setdefault(digest, seq)
        tier = self.pool.tier
        if tier is not None and match.slots:
            tier.hold(match.slots)  # before blocks are taken, which gives slots to others
        self.grow(seq, num_tokens)
        if tier is not None and match.slots:
            tier.bring(match.slots, seq.block_ids[len(matched) : len(match)])

    def take_copies(self) -> BlockCopies:
        """The copies to and from the host tier that the next step makes."""
        return NO_COPIES if self.pool.tier is None else self.pool.tier.take_copies()

    def release_copies(self, copies: BlockCopies) -> None:
        """The step that made these copies was collected."""
        if self.pool.tier is not None:
            self.pool.tier.release(copies)

    def withdraw_copies(self, copies: Iterable[BlockCopies]) -> None:
        """No step is in flight any more, after a failure; these are the copies of those that were."""
        if self.pool.tier is not None:
            self.pool.tier.withdraw(copies)

    def num_missing(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks that `seq` lacks to hold `num_tokens` tokens; negative when it has more."""
        return -(-num_tokens // self.block_size) - len(seq.block_ids)

    def grow(self, seq: Sequence, num_tokens: int) -> list[int]:
        """Append fresh blocks until `num_tokens` tokens fit; returns them. The pool must have enough."""
        missing = self.num_missing(seq, num_tokens)
        if missing <= 0:
            return []
        allocate = self.pool.allocate
        fresh = [allocate() for _ in range(missing)]
        seq.block_ids.extend(fresh)
        self.events.append(BlockEvent(ACQUIRE, seq.request_id, tuple(fresh)))
        return fresh

    def append_block(self, seq: Sequence) -> int:
        """Append one fresh block to the table of `seq`: `grow` for a row that decodes. The pool must have one."""
        block_id = self.pool.allocate()
        seq.block_ids.append(block_id)
        self.events.append(BlockEvent(ACQUIRE, seq.request.request_id, (block_id,)))
        return block_id

    def publish_last(self, sequences: Iterable[Sequence]) -> None:
        """Make matchable the block that the last computed token of each sequence fills: `publish` for rows that decode."""
        if not self._enabled:
            return
        size, publish, put = self.block_size, self.pool.publish, self.events.append
        for seq in sequences:
            end = seq.num_computed
            index = end // size - 1
            chain = seq.block_hashes
            if len(chain) == index:
                parent = chain[-1] if chain else self._root(seq.request)
                chain.append(block_digest(parent, seq.token_ids[end - size : end]))
            digest, block_id = chain[index], seq.block_ids[index]
            if self._announced:
                self._announced.pop(digest, None)
            if publish(block_id, digest):
                put(BlockEvent(PUBLISH, seq.request.request_id, (block_id,)))

    def publish(self, seq: Sequence, first_token: int, end_token: int) -> None:
        """Make matchable the blocks of `seq` that became full between these counts of committed tokens."""
        if not self._enabled:
            return
        first, end = first_token // self.block_size, end_token // self.block_size
        self._hash_until(seq, end)
        pool, digests, table = self.pool, seq.block_hashes, seq.block_ids
        published = [table[i] for i in range(first, end) if pool.publish(table[i], digests[i])]
        for digest in digests[first:end]:
            self._announced.pop(digest, None)
        if published:
            self.events.append(BlockEvent(PUBLISH, seq.request_id, tuple(published)))

    def forget(self) -> None:
        """Empty the prefix cache, while no sequence holds a block: what the blocks held is gone."""
        self._tell_gone(self.pool.forget())

    def withdraw(self, block_ids: Iterable[int]) -> None:
        """Make these blocks matchable no more, but for those that others hold: what they hold may be garbage."""
        self._tell_gone(self.pool.withdraw(block_ids))

    def _tell_gone(self, block_ids: tuple[int, ...]) -> None:
        if block_ids:
            # As if someone had taken them and given them back: who follows the events knows no other way.
            self.events.append(BlockEvent(ACQUIRE, NOBODY, block_ids))
            self.events.append(BlockEvent(RELEASE, NOBODY))

    def release(self, seq: Sequence) -> None:
        """Give all blocks of `seq` back; published ones stay matchable until they are reused."""
        self._awaited.pop(seq, None)
        for digest in seq.block_hashes[seq.num_computed // self.block_size :]:
            if self._announced.get(digest) is seq:
                del self._announced[digest]
        if seq.block_ids:
            self.pool.release(seq.block_ids)
            seq.block_ids = []  # keyframes may still refer to the old table
            self.events.append(BlockEvent(RELEASE, seq.request_id))

    def check_integrity(self, running: list[Sequence]) -> None:
        """Prove that what is announced is being computed, and that tables and digests agree.

        Raises:
            AssertionError: naming the sequence.
        """
        for seq in self._announced.values():
            assert any(seq is other for other in running), (
                f"{seq.request_id} announces blocks but does not run"
            )
        for seq in self._awaited:
            assert seq.status is SequenceStatus.WAITING, f"{seq.request_id} awaits blocks as {seq.status}"
        for seq in running:
            assert len(set(seq.block_ids)) == len(seq.block_ids), f"{seq.request_id} holds a block twice"

    def take_events(self) -> tuple[BlockEvent, ...]:
        """The events since the last call, oldest first."""
        events = tuple(self.events)
        self.events.clear()
        return events

    def _most_matched(self, seq: Sequence) -> int:
        """Blocks that may come from the cache: at least one token is computed, each that a scored one follows, and
        all where all are pooled."""
        params, num_tokens = seq.request.params, len(seq.token_ids)
        if params.prompt_logprobs is not None:
            num_tokens = min(num_tokens, max(1, params.logprob_start_len))
        if params.pooling is not None and params.pooling.kind != "last":
            return 0
        return (num_tokens - 1) // self.block_size

    def _hash_until(self, seq: Sequence, num_blocks: int) -> None:
        if len(seq.block_hashes) < num_blocks:
            extend_chain(
                seq.block_hashes,
                self._root(seq.request),
                seq.token_ids,
                num_blocks,
                self.block_size,
            )

    def _root(self, request: Request) -> bytes:
        salt, lora_digest = key = (request.cache_salt, "" if request.lora is None else request.lora.digest)
        root = self._roots.get(key)
        if root is None:
            if len(self._roots) > 1024:  # salts are the callers' to choose: bound what they make us remember
                self._roots.clear()
            root = self._roots[key] = root_digest(self._version_digest, salt, self.block_size, lora_digest)
        return root
