"""Captured decode steps: launches that know the number of rows alone give the bits of eager ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.attention.random_step import PagedStep, paged_step
from engine.attention.triton_paged import TritonPagedAttention
from engine.kernels.attention_tiles import SPLIT_TOKENS, SUM_ROWS, AttentionShape, Mode, num_partials
from engine.kernels.paged_attention import launch_attention, launch_combine

LENGTHS = [300, 2 * SPLIT_TOKENS + 1, 17, SPLIT_TOKENS + 8, 1]
GUARD = 64  # values behind a buffer's end that nobody may write


def _step(lengths: list[int]) -> PagedStep:
    return paged_step(
        [(n, 1) for n in lengths], num_kv_heads=1, group=2, head_size=64, dtype=torch.float16, seed=4
    )


def _captured(step: PagedStep, max_seq_len: int = 4 * SPLIT_TOKENS) -> PagedStep:
    """The step as a graph would see it: its lengths are known to be at most `max_seq_len`."""
    tables = torch.zeros(len(step.q), max_seq_len // 16, dtype=torch.int32)
    tables[:, : step.meta.block_tables.shape[1]] = step.meta.block_tables
    return replace(
        step, meta=replace(step.meta, block_tables=tables, max_seq_len=max_seq_len, is_captured=True)
    )


def _run(backend: TritonPagedAttention, step: PagedStep, window: int | None = None) -> Tensor:
    return backend.forward(
        step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale, sliding_window=window
    )


def _reserved(step: PagedStep, partials: int, *, deterministic: bool = False) -> TritonPagedAttention:
    backend = TritonPagedAttention(deterministic=deterministic)
    backend.reserve(partials, step.q.shape[1], step.q.shape[2], "cpu")
    return backend


@pytest.mark.parametrize(
    ("window", "deterministic"), [(None, False), (None, True), (90, False), (SPLIT_TOKENS + 3, False)]
)
def test_a_captured_step_gives_the_bits_of_an_eager_one(window: int | None, deterministic: bool) -> None:
    """In exactly the workspace that `num_partials` names, and again with other lengths."""
    step = _step(LENGTHS)
    backend = _reserved(step, num_partials(step.meta.seq_lens.numpy()), deterministic=deterministic)
    held = backend.workspace_bytes
    for lengths in (LENGTHS, [SPLIT_TOKENS, 5, SPLIT_TOKENS + 1, 40, 3 * SPLIT_TOKENS]):
        step = _step(lengths)
        want = _run(TritonPagedAttention(deterministic=deterministic), step, window)
        assert torch.equal(_run(backend, _captured(step), window), want), lengths
    assert backend.workspace_bytes == held


@pytest.mark.parametrize("window", [None, SPLIT_TOKENS + 3])
def test_partials_lie_side_by_side_whoever_folds_them(window: int | None) -> None:
    """One program for all splits of a row, two for three, more than there are: the same bits at the same places."""
    step = _step(LENGTHS)
    shape = AttentionShape(1, 2, 64, 16, torch.float16, window)
    want = _run(TritonPagedAttention(), step, window)
    partials = num_partials(step.meta.seq_lens.numpy()) if window is None else 1 + 3 + 1 + 2 + 1
    found = []
    for programs in (1, 2, 5):
        sums, peaks, totals = (
            torch.full((partials * 2 * size + GUARD,), float("nan")) for size in (64, 1, 1)
        )
        out = torch.empty_like(step.q)
        given = (out, step.q, step.k_cache, step.v_cache, step.meta, shape, Mode.DECODE, False, step.scale)
        launch_attention(
            *given,
            first_row=0,
            num_rows=5,
            split_programs=programs,
            partials=(sums, peaks, totals),
            optional={},
        )
        launch_combine(out, (sums, peaks, totals), step.meta, shape, first_row=0, num_rows=5)
        for buffer in (sums, peaks, totals):
            assert not buffer[:-GUARD].isnan().any(), "a partial was not written"
            assert buffer[-GUARD:].isnan().all(), "something was written behind the last partial"
        assert torch.equal(out, want), programs
        found.append((sums, peaks, totals))
    for other in found[1:]:
        for buffer, first in zip(other, found[0], strict=True):
            assert torch.equal(buffer[:-GUARD], first[:-GUARD])


def test_padding_rows_change_no_bit_of_the_others() -> None:
    step = _captured(_step(LENGTHS))
    padding, rows = 3, len(LENGTHS)
    k_cache, v_cache = (
        torch.cat((torch.full_like(c[:1], float("nan")), c)) for c in (step.k_cache, step.v_cache)
    )
    tables = torch.zeros(rows + padding, step.meta.block_tables.shape[1], dtype=torch.int32)
    tables[:rows] = step.meta.block_tables + 1  # block 0 was never written
    seq_lens = torch.cat((step.meta.seq_lens, torch.ones(padding, dtype=torch.int32)))
    meta = replace(
        step.meta, seq_lens=seq_lens, block_tables=tables, num_decode_rows=rows + padding,
        query_start=torch.arange(rows + padding + 1, dtype=torch.int32),
    )  # fmt: skip
    padded = PagedStep(torch.cat((step.q, step.q[:padding])), k_cache, v_cache, meta)
    got = _run(_reserved(step, num_partials(seq_lens.numpy())), padded)
    assert torch.equal(got[:rows], _run(TritonPagedAttention(), _step(LENGTHS)))
    assert got[rows:].isnan().all(), "a padding row did not read block 0"


def test_more_rows_than_are_counted_at_a_time() -> None:
    lengths = [1 + i % 7 for i in range(SUM_ROWS)]
    lengths[3] = SPLIT_TOKENS + 1
    lengths += [SPLIT_TOKENS + 9, 2]
    step = paged_step([(n, 1) for n in lengths], num_kv_heads=1, group=1, head_size=16, dtype=torch.float16)
    got = _run(_reserved(step, num_partials(step.meta.seq_lens.numpy())), _captured(step, 2 * SPLIT_TOKENS))
    for row in (0, 3, SUM_ROWS - 1, SUM_ROWS, SUM_ROWS + 1):
        alone = _run(TritonPagedAttention(), step.part(row, 0, 1))
        assert torch.equal(got[row : row + 1], alone), row


def test_eager_steps_beyond_a_reserved_workspace_are_cut_and_never_grow_it() -> None:
    step = _step([SPLIT_TOKENS + i for i in (1, 2, 3)])
    backend = _reserved(step, 5)  # two of the three rows at a time
    held = backend.workspace_bytes
    assert torch.equal(_run(backend, step), _run(TritonPagedAttention(), step))
    assert backend.workspace_bytes == held
    with pytest.raises(AssertionError, match="a row of 7 splits"):
        _run(backend, _step([6 * SPLIT_TOKENS + 1]))
    backend.close()
    assert backend.workspace_bytes == 0


def test_a_captured_step_without_a_reserved_workspace_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="reserve"):
        _run(TritonPagedAttention(), _captured(_step(LENGTHS)))
