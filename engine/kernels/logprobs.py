"""Log-probabilities on the device: of given tokens and of the N most likely ones, without a softmax or a sort of the row.

A row's tokens are cut into parts, one program each, that finds its part's peak, sum of exponentials, number of tokens above
the given one, and N most likely tokens; a second kernel merges them. Sums have one fixed order, whatever the number of rows.
Most likely tokens come in order, the lower id first among equals. A row with a not-a-number has no figures: they are too.

Boundary: raw logits in, figures out. Reference: `engine.runner.sampler.token_logprobs`.
Shapes: n rows, V vocabulary, N most likely tokens.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.sampling_filters import key_of, parts_of, value_of

PART_WARPS = 4
MERGE_WARPS = 8


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """Figures of n positions, all on the device."""

    chosen: Tensor  # [n] float32, the log-probability of the given token
    rank: Tensor  # [n] int64, 1 is the most likely
    top_ids: Tensor  # [n, N] int64
    top_values: Tensor  # [n, N] float32


@triton.jit
def _ordered(x, ids, inside):
    """Integers that order tokens by value, then the lower id first; -1 for none. No two are equal."""
    packed = (key_of(x).to(tl.int64) << 31) | (2147483647 - ids).to(tl.int64)
    return tl.where(inside, packed, -1)


@triton.jit(do_not_specialize=["token_ids"])
def part_kernel(
    peaks, totals, above, best, logits, token_ids, vocab, stride_logits,
    NUM_TOP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One part of one row; `best` [n, parts, N] are its most likely tokens in order, as `_ordered` integers."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    place = row * tl.num_programs(1) + part
    ids = part * TILE + tl.arange(0, TILE)
    inside = ids < vocab
    x = tl.load(logits + row * stride_logits + ids, mask=inside, other=float("-inf"))
    own = tl.load(logits + row * stride_logits + tl.load(token_ids + row))
    peak = tl.max(x, 0)
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(peaks + place, peak)
    tl.store(totals + place, tl.sum(tl.exp(x - finite), 0))
    tl.store(above + place, tl.sum((x > own).to(tl.int32), 0))
    left = _ordered(x, ids, inside)
    for i in range(NUM_TOP):
        most = tl.max(left, 0)
        tl.store(best + place * NUM_TOP + i, most)
        left = tl.where(left == most, -1, left)


@triton.jit(do_not_specialize=["token_ids"])
def merge_figures_kernel(
    chosen, rank, top_ids, top_values, peaks, totals, above, best, logits, token_ids, num_parts, stride_logits,
    NUM_TOP: tl.constexpr, TOP_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The parts of one row. PARTS, TOP_PAD: powers of two, no less than the number of parts and N."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    inside = parts < num_parts
    place = row * num_parts + parts
    part_peaks = tl.load(peaks + place, mask=inside, other=float("-inf"))
    peak = tl.max(part_peaks, 0)
    total = tl.sum(tl.load(totals + place, mask=inside, other=0.0) * tl.exp(part_peaks - peak), 0)
    normaliser = peak + tl.log(total)
    own = tl.load(logits + row * stride_logits + tl.load(token_ids + row))
    tl.store(chosen + row, own - normaliser)
    tl.store(rank + row, tl.sum(tl.load(above + place, mask=inside, other=0), 0).to(tl.int64) + 1)
    if NUM_TOP > 0:
        tops = tl.arange(0, TOP_PAD)
        left = tl.load(
            best + place[:, None] * NUM_TOP + tops[None, :],
            mask=inside[:, None] & (tops < NUM_TOP)[None, :],
            other=-1,
        )
        for i in range(NUM_TOP):
            most = tl.max(tl.max(left, 1), 0)
            tl.store(top_ids + row * NUM_TOP + i, 2147483647 - (most & 2147483647))
            tl.store(top_values + row * NUM_TOP + i, value_of(most >> 31) - normaliser)
            left = tl.where(left == most, -1, left)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> TokenFigures:
    """Figures of the given tokens [n] (int32) and of the `num_top` most likely ones under float32 logits [n, V].

    N is `num_top`, at most V. Launches and workspace follow from shapes and `num_top`: a CUDA graph can hold all of it.
    """
    n, vocab = logits.shape
    num_top = min(num_top, vocab)
    assert (logits.dtype, logits.stride(1)) == (torch.float32, 1), (logits.dtype, logits.stride())
    assert (token_ids.dtype, token_ids.shape) == (torch.int32, (n,)), (token_ids.dtype, token_ids.shape)
    tile, parts = parts_of(vocab)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(n, *shape, dtype=dtype, device=logits.device)

    figures = TokenFigures(
        empty(torch.float32), empty(torch.int64), empty(torch.int64, num_top), empty(torch.float32, num_top)
    )
    if n == 0:
        return figures
    partials = (
        empty(torch.float32, parts), empty(torch.float32, parts), empty(torch.int32, parts),
        empty(torch.int64, parts, num_top),
    )  # fmt: skip
    part_kernel[(n, parts)](
        *partials,
        logits,
        token_ids,
        vocab,
        logits.stride(0),
        NUM_TOP=num_top,
        TILE=tile,
        num_warps=PART_WARPS,
    )
    merge_figures_kernel[(n,)](
        figures.chosen, figures.rank, figures.top_ids, figures.top_values, *partials, logits, token_ids, parts,
        logits.stride(0), NUM_TOP=num_top, TOP_PAD=triton.next_power_of_2(max(num_top, 1)),
        PARTS=triton.next_power_of_2(parts), num_warps=MERGE_WARPS,
    )  # fmt: skip
    return figures
