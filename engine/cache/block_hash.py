"""Digest chain of KV blocks: equal digests mean equal tokens behind an equal past, for one version and one salt.

A block's KV values depend on every token before them, so a block's digest covers its parent's digest and its own token
ids; the chain's root covers the version of the weights, the adapter, the caller's salt and the block size. Digests are
16 bytes of BLAKE2b: made to resist collisions by intent, so a match needs no comparison of tokens.

Boundary: bytes in, bytes out. Who owns a block and which digests exist is ``engine.cache.block_pool``'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from struct import Struct

DIGEST_BYTES = 16
TOKEN_BYTES = 4  # fixed width and byte order: digests may be compared between machines


def root_digest(version_digest: str, cache_salt: str, block_size: int, lora_digest: str = "") -> bytes:
    """The parent of a sequence's first block. Each field carries its length, so that none can run into the next.

    `lora_digest`: of the adapter's content; empty: the base alone, whose root has one field less.
    """
    digest = blake2b(digest_size=DIGEST_BYTES, person=b"quire-kv-root")
    fields = (version_digest, cache_salt, str(block_size), *([lora_digest] if lora_digest else []))
    for part in map(str.encode, fields):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of one full block that follows `parent`."""
    return blake2b(parent + _token_bytes(token_ids), digest_size=DIGEST_BYTES).digest()


def extend_chain(
    chain: list[bytes], root: bytes, token_ids: Sequence[int], num_blocks: int, block_size: int
) -> None:
    """Append digests to `chain` until it covers the first `num_blocks` full blocks of `token_ids`.

    Costs O(blocks added); the blocks already covered are neither read nor copied.
    """
    first = len(chain)
    if first >= num_blocks:
        return
    parent = chain[-1] if chain else root
    width = block_size * TOKEN_BYTES
    data = _token_bytes(token_ids[first * block_size : num_blocks * block_size])
    assert len(data) == (num_blocks - first) * width, "a block is not full"
    for offset in range(0, len(data), width):
        parent = blake2b(parent + data[offset : offset + width], digest_size=DIGEST_BYTES).digest()
        chain.append(parent)


def _token_bytes(token_ids: Sequence[int]) -> bytes:
    return _packer(len(token_ids)).pack(*token_ids)


@lru_cache(maxsize=32)  # block sizes, and the latest prompts' lengths
def _packer(num_tokens: int) -> Struct:
    return Struct(f"<{num_tokens}i")
