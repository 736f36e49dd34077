"""Bits of paged attention that its backend promises not to change: by neighbours, chunking, workspace or layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.attention.interface import AttentionMetadata
from engine.attention.random_step import PagedStep, paged_step
from engine.attention.triton_paged import TritonPagedAttention
from engine.kernels.attention_tiles import SPLIT_TOKENS


def _run(step: PagedStep, *, deterministic: bool = False, window: int | None = None) -> Tensor:
    backend = TritonPagedAttention(deterministic=deterministic)
    return backend.forward(
        step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale, sliding_window=window
    )


def test_a_row_decodes_to_the_same_bits_whatever_shares_the_batch() -> None:
    """Short rows too, which alone need no splits and beside a long one are merged from one."""
    rows = [(300, 1), (2 * SPLIT_TOKENS + 1, 1), (17, 1), (SPLIT_TOKENS + 8, 16), (33, 33)]
    step = paged_step(rows, num_kv_heads=2, group=4, head_size=64, dtype=torch.float16)
    together = _run(step)
    for row in range(3):
        assert torch.equal(_run(step.part(row, 0, 1)), together[row : row + 1]), rows[row]


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_deterministic_chunks_and_decode_give_the_same_bits(dtype: torch.dtype, window: int | None) -> None:
    length = SPLIT_TOKENS + 12  # the queries lie on both sides of a split's edge
    whole = paged_step([(length, 24)], num_kv_heads=1, group=2, head_size=64, dtype=dtype)
    want = _run(whole, deterministic=True, window=window)
    beside = paged_step([(200, 1), (40, 7)], num_kv_heads=1, group=2, head_size=64, dtype=dtype, seed=9)
    for begin, end in [(0, 11), (11, 12), (12, 23), (23, 24)]:
        part = whole.part(0, begin, end)
        assert torch.equal(_run(part, deterministic=True, window=window), want[begin:end]), (begin, end)
        got = _run(_joined(beside, part), deterministic=True, window=window)
        first = 1 if end - begin == 1 else 8
        assert torch.equal(got[first : first + end - begin], want[begin:end]), f"{begin}:{end} in a batch"


def test_rows_beyond_the_workspace_are_done_in_further_launches_with_the_same_bits() -> None:
    rows = [(SPLIT_TOKENS + i, 1) for i in (1, 2, 3)]
    step = paged_step(rows, num_kv_heads=1, group=2, head_size=64, dtype=torch.float16)
    one_row = 4 * 2 * 2 * (64 + 2)  # bytes of float32 partials: 2 splits, 2 heads
    small = TritonPagedAttention(max_workspace_bytes=one_row)
    got = small.forward(step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale)
    assert small.workspace_bytes == one_row
    assert torch.equal(got, _run(step))
    small.close()
    assert small.workspace_bytes == 0


def test_queries_may_be_a_view_and_the_result_may_be_given() -> None:
    step = paged_step(
        [(17, 1), (SPLIT_TOKENS + 1, 1), (35, 33)], num_kv_heads=1, group=2, head_size=64, dtype=torch.float16
    )
    merged = torch.full((len(step.q), 4, 64), float("nan"), dtype=torch.float16)
    merged[:, :2] = step.q
    out = torch.full_like(merged, 7.0)
    view = replace(step, q=merged[:, :2])
    got = TritonPagedAttention().forward(
        view.q, step.k_cache, step.v_cache, step.meta, scale=step.scale, out=out[:, :2]
    )
    assert got.data_ptr() == out.data_ptr()
    assert torch.equal(got, _run(step))
    assert (out[:, 2:] == 7).all()


def _joined(first: PagedStep, second: PagedStep) -> PagedStep:
    """Both steps in one: the decode row of `first`, then `second` where its kind puts it, then the prefill row."""
    blocks = len(first.k_cache)
    width = max(first.meta.block_tables.shape[1], second.meta.block_tables.shape[1])
    tables = torch.zeros(3, width, dtype=torch.int32)
    order = [0, 2, 1] if second.meta.num_decode_rows else [0, 1, 2]
    tables[:2, : first.meta.block_tables.shape[1]] = first.meta.block_tables
    tables[2, : second.meta.block_tables.shape[1]] = second.meta.block_tables[0] + blocks
    queries = torch.cat((first.meta.query_start.diff(), second.meta.query_start.diff()))[order]
    pieces = [first.q[:1], first.q[1:], second.q]
    meta = AttentionMetadata(
        query_start=torch.cat((torch.zeros(1, dtype=torch.int32), queries.cumsum(0, dtype=torch.int32))),
        seq_lens=torch.cat((first.meta.seq_lens, second.meta.seq_lens))[order],
        block_tables=tables[order],
        slot_mapping=torch.zeros(len(first.q) + len(second.q), dtype=torch.int64),
        max_query_len=max(first.meta.max_query_len, second.meta.max_query_len),
        max_seq_len=max(first.meta.max_seq_len, second.meta.max_seq_len),
        num_decode_rows=first.meta.num_decode_rows + second.meta.num_decode_rows,
    )
    return PagedStep(
        torch.cat([pieces[i] for i in order]), torch.cat((first.k_cache, second.k_cache)),
        torch.cat((first.v_cache, second.v_cache)), meta,
    )  # fmt: skip
