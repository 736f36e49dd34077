"""The compiled kernels of this machine, and random steps over a shuffled block table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.attention.interface import AttentionMetadata
from engine.kernels import cpu_library
from engine.kernels.cpu_library import CpuLibrary


@pytest.fixture(scope="session")
def library() -> CpuLibrary:
    """The compiled kernels; skips, with the reason, where this machine cannot build them."""
    found = cpu_library.load()
    if found is None:
        pytest.skip(f"no compiled CPU kernels here: {cpu_library.unavailable_reason()}")
    return found


@dataclass(frozen=True)
class RandomStep:
    """A step of rows (context, new tokens): all keys and values in the caches, the new tokens' apart as well."""

    q: Tensor  # [T, H, D]
    k: Tensor  # [T, K, D] of the step's tokens
    v: Tensor
    k_cache: Tensor  # without the step's tokens: NaN there, and in every slot that no row owns
    v_cache: Tensor
    meta: AttentionMetadata


def _make_step(
    rows: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    size: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> RandomStep:
    """Rows of (context length, new tokens), decode rows first. Blocks lie shuffled in a pool with spare ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lengths = [context + new for context, new in rows]
    counts = [-(-length // block_size) for length in lengths]
    pool = torch.randperm(sum(counts) + 3, generator=generator).int()
    tables = torch.full((len(rows), max(counts) + 1), -1, dtype=torch.int32)
    k_cache = torch.full((len(pool), kv_heads, block_size, size), float("nan"), dtype=dtype)
    v_cache = k_cache.clone()
    slots, keys, values = [], [], []
    for row, (context, new) in enumerate(rows):
        blocks, pool = pool[: counts[row]], pool[counts[row] :]
        tables[row, : counts[row]] = blocks
        at = torch.arange(context + new)
        slot = blocks[at // block_size].long() * block_size + at % block_size
        k, v = normal(context + new, kv_heads, size), normal(context + new, kv_heads, size)
        old = slot[:context]
        k_cache[old // block_size, :, old % block_size] = k[:context]
        v_cache[old // block_size, :, old % block_size] = v[:context]
        slots.append(slot[context:])
        keys.append(k[context:])
        values.append(v[context:])
    new_counts = torch.tensor([0] + [new for _, new in rows])
    meta = AttentionMetadata(
        query_start=new_counts.cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        max_query_len=max(new for _, new in rows),
        max_seq_len=max(lengths),
        num_decode_rows=sum(1 for _, new in rows if new == 1),
    )
    tokens = int(new_counts.sum())
    return RandomStep(normal(tokens, heads, size), torch.cat(keys), torch.cat(values), k_cache, v_cache, meta)


@pytest.fixture(scope="session")
def make_step() -> Callable[..., RandomStep]:
    return _make_step
