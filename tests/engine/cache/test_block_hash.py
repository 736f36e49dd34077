"""Digest chains: what makes two blocks the same block, and what must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.cache.block_hash import DIGEST_BYTES, block_digest, extend_chain, root_digest

ROOT = root_digest("version", "", 4)


def chain_of(tokens: list[int], root: bytes = ROOT, block_size: int = 4) -> list[bytes]:
    chain: list[bytes] = []
    extend_chain(chain, root, tokens, len(tokens) // block_size, block_size)
    return chain


def test_equal_tokens_behind_an_equal_past_have_equal_digests() -> None:
    assert chain_of([1, 2, 3, 4, 5, 6, 7, 8]) == chain_of([1, 2, 3, 4, 5, 6, 7, 8])


def test_equal_tokens_behind_another_past_differ() -> None:
    first, second = chain_of([1, 2, 3, 4, 5, 6, 7, 8]), chain_of([1, 2, 3, 9, 5, 6, 7, 8])
    assert first[0] != second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize(
    "changed", [("other", "", 4), ("version", "salt", 4), ("version", "", 8), ("version", "", 4, "adapter")]
)
def test_version_salt_block_size_and_adapter_each_separate(changed: tuple[Any, ...]) -> None:
    assert root_digest(*changed) != ROOT
    assert chain_of([1, 2, 3, 4], root_digest(*changed)) != chain_of([1, 2, 3, 4])


def test_fields_of_the_root_do_not_run_into_each_other() -> None:
    assert root_digest("ab", "c", 4) != root_digest("a", "bc", 4)


def test_token_boundaries_cannot_be_confused() -> None:
    assert block_digest(ROOT, [1, 0]) != block_digest(ROOT, [256])
    assert block_digest(ROOT, [0, 1]) != block_digest(ROOT, [1, 0])


def test_a_chain_extended_step_by_step_equals_the_chain_made_at_once() -> None:
    tokens = np.random.default_rng(0).integers(0, 200_000, 64).tolist()
    grown: list[bytes] = []
    for num_blocks in (1, 1, 3, 9, 16):
        extend_chain(grown, ROOT, tokens, num_blocks, 4)
        assert len(grown) == num_blocks
    by_hand, parent = [], ROOT
    for i in range(16):
        parent = block_digest(parent, tokens[4 * i : 4 * i + 4])
        by_hand.append(parent)
    assert grown == chain_of(tokens) == by_hand
    assert {len(digest) for digest in grown} == {DIGEST_BYTES}


def test_a_block_that_is_not_full_is_refused() -> None:
    with pytest.raises(AssertionError, match="not full"):
        extend_chain([], ROOT, [1, 2, 3, 4, 5], 2, 4)
