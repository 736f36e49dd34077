"""Paged attention, through its backend, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.attention.random_step import PagedStep, excess_error, paged_step
from engine.attention.triton_paged import TritonPagedAttention
from engine.errors import ConfigError
from engine.kernels.attention_tiles import SPLIT_TOKENS

# (tokens of the row, tokens of this step). Contexts of one token, of a block and one more, of a KV tile and one more, on
# both sides of a split and over two; prefills from nothing, across a block, across a split, and of several query tiles.
DECODE = [
    (1, 1), (16, 1), (17, 1), (64, 1), (65, 1), (SPLIT_TOKENS - 1, 1), (SPLIT_TOKENS, 1), (SPLIT_TOKENS + 1, 1),
    (2 * SPLIT_TOKENS + 1, 1),
]  # fmt: skip
PREFILL = [(2, 2), (33, 33), (70, 5), (SPLIT_TOKENS + 8, 16), (140, 131)]
FEW = [(17, 1), (SPLIT_TOKENS + 1, 1), (35, 33), (SPLIT_TOKENS + 8, 16)]


def _run(step: PagedStep, *, deterministic: bool = False, window: int | None = None) -> Tensor:
    backend = TritonPagedAttention(deterministic=deterministic)
    return backend.forward(
        step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale, sliding_window=window
    )


def _assert_close(got: Tensor, step: PagedStep, window: int | None = None) -> None:
    excess = excess_error(got, step, window)
    assert excess <= 1.0, f"the error is {excess:.2f} of what rounding allows"  # false for not-a-number too


# Head sizes with and without padding; groups that fill, half fill and do not divide a query tile. Each value meets two
# others rather than all: the constants they set are independent in the kernel.
@pytest.mark.parametrize(
    ("heads", "group", "size", "block_size", "dtype"),
    [
        (2, 4, 64, 16, torch.float16),
        (1, 7, 80, 32, torch.float32),
        (2, 1, 128, 16, torch.float16),
        (1, 2, 64, 32, torch.bfloat16),
        (1, 4, 128, 16, torch.bfloat16),
        (1, 8, 128, 32, torch.float16),
        (2, 7, 64, 16, torch.bfloat16),
        (1, 2, 80, 16, torch.float16),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_mixed_steps_agree_with_the_definition(
    heads: int, group: int, size: int, block_size: int, dtype: torch.dtype, deterministic: bool
) -> None:
    step = paged_step(
        FEW, num_kv_heads=heads, group=group, head_size=size, block_size=block_size, dtype=dtype, seed=group
    )
    _assert_close(_run(step, deterministic=deterministic), step)


@pytest.mark.parametrize("rows", [DECODE, PREFILL, DECODE + PREFILL], ids=["decode", "prefill", "mixed"])
def test_boundary_lengths(rows: list[tuple[int, int]]) -> None:
    step = paged_step(rows, num_kv_heads=1, group=2, head_size=64, dtype=torch.float16)
    _assert_close(_run(step), step)


@pytest.mark.parametrize("deterministic", [False, True])
def test_float32_shows_one_key_too_many_or_too_few_even_in_a_long_context(deterministic: bool) -> None:
    step = paged_step([*DECODE, (SPLIT_TOKENS + 8, 16)], num_kv_heads=1, group=4, head_size=16, seed=3)
    _assert_close(_run(step, deterministic=deterministic), step)


# A window inside a tile, across tiles, across splits, and wider than every context.
@pytest.mark.parametrize(
    ("window", "deterministic"),
    [
        (1, False),
        (9, False),
        (100, False),
        (SPLIT_TOKENS + 3, False),
        (5000, False),
        (9, True),
        (SPLIT_TOKENS + 3, True),
    ],
)
def test_window(window: int, deterministic: bool) -> None:
    rows = [(8, 1), (SPLIT_TOKENS + 5, 1), (2 * SPLIT_TOKENS + 3, 1), (40, 30), (SPLIT_TOKENS + 20, 50)]
    step = paged_step(rows, num_kv_heads=1, group=2, head_size=64, dtype=torch.float16)
    _assert_close(_run(step, window=window, deterministic=deterministic), step, window)


@pytest.mark.parametrize("deterministic", [False, True])
def test_blocks_before_the_window_are_not_read(deterministic: bool) -> None:
    window, rows = 100, [(2 * SPLIT_TOKENS + 3, 1), (SPLIT_TOKENS + 20, 20)]
    step = paged_step(rows, num_kv_heads=1, group=2, head_size=64, dtype=torch.float16)
    want = _run(step, window=window, deterministic=deterministic)
    tables, unused = step.meta.block_tables.clone(), step.meta.block_tables[0, -1]
    for row, (length, queries) in enumerate(rows):
        tables[row, : (length - queries + 1 - window) // 16] = unused  # a block of not-a-numbers
    freed = replace(step, meta=replace(step.meta, block_tables=tables))
    assert torch.equal(_run(freed, window=window, deterministic=deterministic), want)


def test_what_the_kernels_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="float64"):
        TritonPagedAttention.check_supported(torch.float64, 64)
    with pytest.raises(ConfigError, match="512"):
        TritonPagedAttention.check_supported(torch.bfloat16, 512)
