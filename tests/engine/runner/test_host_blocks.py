"""HostBlocks moves the whole content of the named blocks, of every layer, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.models.decoder import LayerCache
from engine.plan import NO_COPIES, BlockCopies, KVSpec
from engine.runner.host_blocks import HostBlocks, by_block
from engine.runner.model_runner import allocate_caches

SPEC = KVSpec(num_layers=3, num_kv_heads=2, head_size=5, block_size=4, dtype_bytes=4)
NUM_BLOCKS, NUM_SLOTS = 7, 6


@pytest.fixture
def caches() -> list[LayerCache]:
    """Every value differs from every other one."""
    made = allocate_caches(SPEC, NUM_BLOCKS, torch.float32, torch.device("cpu"))
    for i, cache in enumerate(made):
        for j, half in enumerate((cache.k, cache.v)):
            half.copy_(torch.arange(half.numel()).view(half.shape) + (2 * i + j) * half.numel())
    return made


def content(caches: list[LayerCache], block: int) -> Tensor:
    return torch.stack([half[block] for cache in caches for half in (cache.k, cache.v)])


def copies(out: list[tuple[int, int]], back: list[tuple[int, int]]) -> BlockCopies:
    arrays = (torch.tensor(pairs, dtype=torch.int32).view(-1, 2).numpy() for pairs in (out, back))
    return BlockCopies(*arrays)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_dtype_goes_and_comes_back_with_what_lies_beside_it(dtype: torch.dtype) -> None:
    values = torch.arange(48).view(4, 3, 4).to(dtype)
    blocks, scales = values.clone(), torch.arange(8.0).view(4, 2)
    host = HostBlocks(2, [blocks, scales], staging_bytes=1)
    host.copy(copies([(1, 0), (3, 1)], [(1, 0), (0, 2)]))
    assert torch.equal(blocks.float(), values[[3, 1, 1, 3]].float())
    assert scales.tolist() == [[6, 7], [2, 3], [2, 3], [6, 7]]


@pytest.mark.parametrize("num_staged", [1, 2, 64])
def test_blocks_come_back_as_they_went(caches: list[LayerCache], num_staged: int) -> None:
    before = [content(caches, block) for block in range(NUM_BLOCKS)]
    host = HostBlocks(NUM_SLOTS, by_block(caches), staging_bytes=num_staged * SPEC.bytes_per_block)
    # Slots 4, 0, 1, 5 are runs of two; 3 is by itself.
    host.copy(copies([(6, 4), (2, 0), (5, 1), (0, 5), (3, 3)], []))
    assert all(torch.equal(content(caches, block), before[block]) for block in range(NUM_BLOCKS))
    for cache in caches:
        cache.k.fill_(-1)
        cache.v.fill_(-1)
    host.copy(NO_COPIES)
    host.copy(copies([], [(1, 2), (4, 0), (3, 6), (0, 3)]))
    expected = {2: before[5], 0: before[6], 6: before[3], 3: before[2]}
    for block in range(NUM_BLOCKS):
        assert torch.equal(content(caches, block), expected.get(block, torch.full_like(before[0], -1))), block


def test_within_a_step_blocks_go_out_before_others_come_in(caches: list[LayerCache]) -> None:
    """Block 1 is given up and filled from the very slot that it went to, block 2 from one that was filled earlier."""
    before = [content(caches, block) for block in range(NUM_BLOCKS)]
    host = HostBlocks(NUM_SLOTS, by_block(caches))
    host.copy(copies([(4, 0)], []))
    host.copy(copies([(1, 2), (2, 3)], [(0, 1), (2, 2)]))
    assert torch.equal(content(caches, 1), before[4])
    assert torch.equal(content(caches, 2), before[1])
    host.copy(copies([], [(3, 5)]))
    assert torch.equal(content(caches, 5), before[2])


def test_caches_that_are_not_one_allocation_are_refused(caches: list[LayerCache]) -> None:
    with pytest.raises(AssertionError, match="one behind the other"):
        by_block([*caches[:-1], LayerCache(caches[-1].k.clone(), caches[-1].v.clone())])
