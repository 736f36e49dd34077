"""Paged causal attention: one kernel for prefill, decode and mixed steps, and the kernel that merges split contexts.

The query heads that share a KV head are packed with the tokens into one tile (row r is token r // GROUP, head
r % GROUP), so that a key is read once for all of them. Keys are folded with a running maximum and sum (Milakov and
Gimelshein 2018; Dao et al. 2022), in float32, left to right in steps of BLOCK_N from an absolute multiple of it. Long
decode contexts are cut at absolute multiples of SPLIT and merged by `combine_kernel` in order. Where a row's partials lie
and which program folds them follow from the lengths on the device, so that a captured launch fits any lengths.

A quantized cache (`engine.kernels.kv_quantization`) is widened as it is read, exactly; a key's scale multiplies its
scores, a value's its weights, which are then rounded to bfloat16, whose range no scale leaves.

Boundary: reads the layout of `engine.plan.KVSpec`; positions, tables and lengths come as tensors and are never copied
to the host. Scheduling, workspace and the choice of launches: `engine.attention.triton_paged`.

Shapes: T tokens, S rows, H query heads, K KV heads, D head size.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention.interface import AttentionMetadata
from engine.kernels.attention_tiles import AttentionShape, Mode, combine_variant, variant


@triton.jit
def _merge(acc, peak, total, other_acc, other_peak, other_total):
    """Merge two unnormalised softmax sums over disjoint keys; an empty one (peak -inf) changes no bit of the other."""
    top = tl.maximum(peak, other_peak)
    top_finite = tl.where(top == float("-inf"), 0.0, top)
    left = tl.exp2(peak - top_finite)
    right = tl.exp2(other_peak - top_finite)
    acc = acc * left[:, None] + other_acc * right[:, None]
    return acc, top, total * left + other_total * right


@triton.jit
def _soft_capped(score_log2, CAP: tl.constexpr):
    """cap * tanh(score / cap), scores times log2(e); the exponential is at most 1, so that nothing overflows."""
    shrunk = tl.exp2(tl.abs(score_log2) * (-2.0 / CAP))
    size = (1.0 - shrunk) / (1.0 + shrunk) * (CAP * 1.4426950408889634)
    return tl.where(score_log2 < 0.0, -size, size)


@triton.jit
def _widened(stored, dtype: tl.constexpr, CACHE: tl.constexpr):
    """Values of a quantized cache without their scales; of fp8, 2^-8 of them."""
    if CACHE == "fp8":
        # Sign, 4 bits of exponent and 3 of mantissa, each where float16 has it: no fp8 instruction is needed.
        wide = ((stored.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True)
    else:
        wide = stored.to(tl.float32)
    return wide.to(dtype)


@triton.jit
def _scales(place, live, MASKED: tl.constexpr):
    """Scales of a tile's keys, [1, BLOCK_N]; masked, 0 for those that are not read."""
    if MASKED:
        scales = tl.load(place, mask=live, other=0.0)
    else:
        scales = tl.load(place)
    return scales[None, :]


@triton.jit
def _fold(
    acc, peak, total, q, k_head, v_head, k_scale, v_scale, table, begin, end, first_key, past_key, position,
    scale_log2, slope_log2,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CACHE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the keys of tiles [begin, end) into (acc, peak, total); begin is a multiple of BLOCK_N.

    Unless MASKED, every query row sees every key of these tiles. Masked, only keys in [first_key, past_key) are read:
    what lies beyond in a block may never have been written, and not-a-number times zero is not zero. An int8 cache has
    its scales at `k_scale` and `v_scale`; an fp8 cache's `v_scale` is a number, and its keys' is part of `scale_log2`.
    """
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_PAD)
    for start in range(begin, end, BLOCK_N):
        key = start + columns
        live = (key >= first_key) & (key < past_key)
        if MASKED:
            block = tl.load(table + key // BLOCK_SIZE, mask=live, other=0)
        else:
            block = tl.load(table + key // BLOCK_SIZE)
        slot = block.to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE) + key % BLOCK_SIZE
        offset = (slot * HEAD_SIZE)[:, None] + dims[None, :]
        if MASKED:
            readable = live[:, None] & (dims < HEAD_SIZE)[None, :]
            k = tl.load(k_head + offset, mask=readable, other=0.0)
            v = tl.load(v_head + offset, mask=readable, other=0.0)
        elif HEAD_PAD != HEAD_SIZE:
            k = tl.load(k_head + offset, mask=(dims < HEAD_SIZE)[None, :], other=0.0)
            v = tl.load(v_head + offset, mask=(dims < HEAD_SIZE)[None, :], other=0.0)
        else:
            k = tl.load(k_head + offset)
            v = tl.load(v_head + offset)
        if CACHE != "":
            k = _widened(k, q.dtype, CACHE)
            v = _widened(v, tl.float32 if q.dtype == tl.float32 else tl.bfloat16, CACHE)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if CACHE == "int8":
            score *= _scales(k_scale + slot, live, MASKED)
        if SOFTCAP > 0.0:
            score = _soft_capped(score, SOFTCAP)
        if slope_log2 is not None:
            score += slope_log2[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        if MASKED:
            visible = live[None, :] & (key[None, :] <= position[:, None])
            if WINDOW > 0:
                visible = visible & (key[None, :] > position[:, None] - WINDOW)
            score = tl.where(visible, score, float("-inf"))
        top = tl.maximum(peak, tl.max(score, 1))
        top_finite = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(score - top_finite[:, None])
        fade = tl.exp2(peak - top_finite)
        total = total * fade + tl.sum(weight, 1)
        if CACHE == "int8":
            weight *= _scales(v_scale + slot, live, MASKED)
        elif CACHE == "fp8":
            weight *= v_scale
        acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = top
    return acc, peak, total


@triton.jit
def _fold_split(
    split_begin, q, k_head, v_head, k_scale, v_scale, table, begin, first_key, past_key, position,
    scale_log2, slope_log2,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """The sums over one split's keys, from nothing: the same bits whichever program and kernel folds it."""
    return _fold(
        tl.zeros([BLOCK_M, HEAD_PAD], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32), q, k_head, v_head, k_scale, v_scale, table,
        tl.maximum(split_begin, begin), tl.minimum(split_begin + SPLIT, past_key),
        first_key, past_key, position, scale_log2, slope_log2,
        NUM_KV_HEADS, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, BLOCK_N, WINDOW, SOFTCAP, CACHE, True,
    )  # fmt: skip


@triton.jit
def _first_partial(
    seq_lens, first_row, row, SPLIT: tl.constexpr, WINDOW: tl.constexpr, SUM_ROWS: tl.constexpr
):
    """Where a decode row's partials begin: behind those of the launch's rows before it, one for each split they touch."""
    before = tl.zeros([SUM_ROWS], tl.int32)
    for start in range(first_row, row, SUM_ROWS):
        other = start + tl.arange(0, SUM_ROWS)
        seq_len = tl.load(seq_lens + other, mask=other < row, other=0)
        splits = tl.cdiv(seq_len, SPLIT)
        if WINDOW > 0:
            splits -= tl.maximum(seq_len - WINDOW, 0) // SPLIT
        before += splits
    return tl.sum(before, 0)


@triton.jit
def _row_of_tile(tile, query_start, first_row, num_rows, BLOCK_Q: tl.constexpr):
    """Which row a query tile belongs to: row i's tiles begin at (its first token) // BLOCK_Q + i. Binary search."""
    base = tl.load(query_start + first_row)
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        begins = (tl.load(query_start + first_row + middle) - base) // BLOCK_Q + middle
        if begins <= tile:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    begins = (tl.load(query_start + first_row + row) - base) // BLOCK_Q + row
    return first_row + row, (tile - begins) * BLOCK_Q


# Arguments whose value or alignment changes from step to step: each new kind would be compiled in the middle of serving.
_CHANGING = [
    "block_tables", "seq_lens", "query_start", "part_peak", "part_total", "stride_table", "first_row", "num_rows",
]  # fmt: skip


@triton.jit(do_not_specialize=_CHANGING)
def paged_attention_kernel(
    out, q, k_cache, v_cache, block_tables, seq_lens, query_start, part_acc, part_peak, part_total,
    scale_log2, stride_qt, stride_ot, stride_table, first_row, num_rows, k_scale, v_scale, alibi_slopes,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    SPLIT: tl.constexpr, SUM_ROWS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CACHE: tl.constexpr,
    PREFILL: tl.constexpr, PARTIAL: tl.constexpr, BY_SPLIT: tl.constexpr, UNMASKED_BODY: tl.constexpr,
):  # fmt: skip
    """One program: one tile of query rows of one KV head. Axes: decode (row, head, splits); prefill (query tile, head).

    PARTIAL: fold every num_programs(2)-th split, each from nothing, and store its sum for `combine_kernel`. BY_SPLIT:
    fold all splits, each from nothing, and merge them as the combine kernel does. UNMASKED_BODY: tiles that every row
    sees whole are folded without masks.
    """
    kv_head = tl.program_id(1)
    if PREFILL:
        # Last tiles first: under a causal mask they have the most keys, and the short ones then fill the gaps.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        row, first_token = _row_of_tile(tile, query_start, first_row, num_rows, BLOCK_Q)
    else:
        row = first_row + tl.program_id(0)
        first_token = 0
    query_begin = tl.load(query_start + row)
    query_len = tl.load(query_start + row + 1) - query_begin
    if first_token >= query_len:
        return
    seq_len = tl.load(seq_lens + row)
    computed = seq_len - query_len
    low = computed + first_token
    past_key = tl.minimum(low + BLOCK_Q, seq_len)
    first_key = 0
    if WINDOW > 0:
        first_key = tl.maximum(low - WINDOW + 1, 0)
    first_split = first_key // SPLIT
    if PARTIAL:  # noqa: SIM102 (decided when the kernel is compiled)
        if (first_split + tl.program_id(2)) * SPLIT >= past_key:
            return

    packed = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_PAD)
    token = first_token + packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    valid = (packed < BLOCK_Q * GROUP) & (token < query_len)
    cell = valid[:, None] & (dims < HEAD_SIZE)[None, :]
    flat = (query_begin + token).to(tl.int64)
    queries = tl.load(
        q + (flat * stride_qt + head * HEAD_SIZE)[:, None] + dims[None, :], mask=cell, other=0.0
    )
    position = computed + token
    k_head = k_cache + kv_head * (BLOCK_SIZE * HEAD_SIZE)
    v_head = v_cache + kv_head * (BLOCK_SIZE * HEAD_SIZE)
    if CACHE == "int8":
        k_scale += kv_head * BLOCK_SIZE
        v_scale += kv_head * BLOCK_SIZE
    elif CACHE == "fp8":
        # 2^8 for what `_widened` leaves out; each factor is exact or rounded alike in every kernel.
        scale_log2 *= tl.load(k_scale + kv_head) * 256.0
        v_scale = tl.load(v_scale + kv_head) * 256.0
    table = block_tables + row.to(tl.int64) * stride_table
    if alibi_slopes is not None:
        slope_log2 = tl.load(alibi_slopes + head) * 1.4426950408889634
    else:
        slope_log2 = None

    begin = first_key // BLOCK_N * BLOCK_N
    if PARTIAL:
        first_place = _first_partial(seq_lens, first_row, row, SPLIT, WINDOW, SUM_ROWS) - first_split
        stride = tl.num_programs(2) * SPLIT
        for split_begin in range((first_split + tl.program_id(2)) * SPLIT, past_key, stride):
            acc, peak, total = _fold_split(
                split_begin, queries, k_head, v_head, k_scale, v_scale, table, begin, first_key, past_key, position,
                scale_log2, slope_log2, NUM_KV_HEADS, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, BLOCK_M, BLOCK_N, SPLIT, WINDOW,
                SOFTCAP, CACHE,
            )  # fmt: skip
            place = (first_place + split_begin // SPLIT).to(tl.int64) * (NUM_KV_HEADS * GROUP)
            values = (head * HEAD_SIZE)[:, None] + dims[None, :]
            tl.store(part_acc + place * HEAD_SIZE + values, acc, mask=cell)
            tl.store(part_peak + place + head, peak, mask=valid)
            tl.store(part_total + place + head, total, mask=valid)
    else:
        acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if BY_SPLIT:
            for split_begin in range(first_split * SPLIT, past_key, SPLIT):
                split_acc, split_peak, split_total = _fold_split(
                    split_begin, queries, k_head, v_head, k_scale, v_scale, table, begin, first_key, past_key, position,
                    scale_log2, slope_log2, NUM_KV_HEADS, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, BLOCK_M, BLOCK_N, SPLIT, WINDOW,
                    SOFTCAP, CACHE,
                )  # fmt: skip
                acc, peak, total = _merge(acc, peak, total, split_acc, split_peak, split_total)
        else:
            if UNMASKED_BODY:
                whole = (low + 1) // BLOCK_N * BLOCK_N
                acc, peak, total = _fold(
                    acc, peak, total, queries, k_head, v_head, k_scale, v_scale, table, begin, whole, first_key,
                    past_key, position, scale_log2, slope_log2, NUM_KV_HEADS, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, BLOCK_N,
                    WINDOW, SOFTCAP, CACHE, False,
                )  # fmt: skip
                begin = whole
            acc, peak, total = _fold(
                acc, peak, total, queries, k_head, v_head, k_scale, v_scale, table, begin, past_key, first_key,
                past_key, position, scale_log2, slope_log2, NUM_KV_HEADS, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, BLOCK_N,
                WINDOW, SOFTCAP, CACHE, True,
            )  # fmt: skip

        # Rows of the tile that stand for no token may have seen no key.
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        target = (flat * stride_ot + head * HEAD_SIZE)[:, None] + dims[None, :]
        tl.store(out + target, result.to(out.dtype.element_ty), mask=cell)


@triton.jit(
    do_not_specialize=[name for name in _CHANGING if name not in ("block_tables", "stride_table", "num_rows")]
)
def combine_kernel(
    out, part_acc, part_peak, part_total, seq_lens, query_start, stride_ot, first_row,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, SPLIT: tl.constexpr,
    SUM_ROWS: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one query head of one row; its splits are merged in order of position."""
    row = first_row + tl.program_id(0)
    head = tl.program_id(1)
    seq_len = tl.load(seq_lens + row)
    first_split = 0
    if WINDOW > 0:
        first_split = tl.maximum(seq_len - WINDOW, 0) // SPLIT
    count = tl.cdiv(seq_len, SPLIT) - first_split
    dims = tl.arange(0, HEAD_PAD)
    one = tl.arange(0, 1)
    inside = dims < HEAD_SIZE
    acc = tl.zeros([1, HEAD_PAD], tl.float32)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    base = _first_partial(seq_lens, first_row, row, SPLIT, WINDOW, SUM_ROWS).to(tl.int64)
    for part in tl.range(0, count, num_stages=STAGES):
        place = (base + part) * NUM_HEADS + head + one
        other_acc = tl.load(
            part_acc + (place * HEAD_SIZE)[:, None] + dims[None, :], mask=inside[None, :], other=0.0
        )
        acc, peak, total = _merge(
            acc, peak, total, other_acc, tl.load(part_peak + place), tl.load(part_total + place)
        )
    result = acc / total[:, None]
    flat = tl.load(query_start + row).to(tl.int64)
    target = (flat * stride_ot + (head + one) * HEAD_SIZE)[:, None] + dims[None, :]
    tl.store(out + target, result.to(out.dtype.element_ty), mask=inside[None, :])


# float32 sums [partials, H, D], peaks and totals [partials, H], each flat; a row's partials lie behind those of the row
# before it in the launch, in order of position
Partials = tuple[Tensor, Tensor, Tensor]

LOG2_E = 1.4426950408889634  # the kernels exponentiate in base 2


def launch_attention(
    out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, shape: AttentionShape,
    mode: Mode, deterministic: bool, scale: float, *, first_row: int, num_rows: int,
    split_programs: int, partials: Partials | None, optional: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Launch `paged_attention_kernel` over rows [first_row, first_row + num_rows), all of them of the mode's kind.

    `split_programs` programs share the splits of a decode row's KV head; `partials` has room for those of all rows.
    `optional` holds the tensors that only some variants take, by the kernel's names for them.
    """
    form = variant(shape, mode, deterministic)
    if mode.is_decode:
        grid = (num_rows, shape.num_kv_heads, split_programs)
    else:
        # An upper bound that needs no lengths on the host: each row adds at most one tile that is not full.
        grid = ((q.shape[0] - first_row) // form.tokens_per_tile + num_rows, shape.num_kv_heads, 1)
    sums, peaks, totals = partials or (out, out, out)
    paged_attention_kernel[grid](
        out, q, k_cache, v_cache, meta.block_tables, meta.seq_lens, meta.query_start, sums, peaks, totals,
        scale * LOG2_E, q.stride(0), out.stride(0), meta.block_tables.stride(0), first_row, num_rows,
        **optional, **form.constants, **form.options,
    )  # fmt: skip


def launch_combine(
    out: Tensor, partials: Partials, meta: AttentionMetadata, shape: AttentionShape, *,
    first_row: int, num_rows: int,
) -> None:  # fmt: skip
    """Launch `combine_kernel` over the rows whose partials were just written."""
    form = combine_variant(shape)
    combine_kernel[(num_rows, shape.num_kv_heads * shape.group)](
        out, *partials, meta.seq_lens, meta.query_start, out.stride(0), first_row,
        **form.constants, **form.options,
    )  # fmt: skip


def paged_attention_ref(
    q: Tensor,  # [T, H, D]
    k_cache: Tensor,  # [num_blocks, K, block_size, D]
    v_cache: Tensor,
    block_tables: Tensor,  # [S, max_blocks]
    seq_lens: Tensor,  # [S]
    query_start: Tensor,  # [S + 1]
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,  # [H]
) -> Tensor:
    """The same by the definition, row by row in float64 and rounded once: the oracle of the kernels, not a backend."""
    out = torch.empty_like(q)
    group = q.shape[1] // k_cache.shape[1]
    block_size = k_cache.shape[2]
    for row, length in enumerate(seq_lens.tolist()):
        begin, end = int(query_start[row]), int(query_start[row + 1])
        blocks = block_tables[row, : -(-length // block_size)].long()
        keys, values = (
            cache[blocks].transpose(1, 2).flatten(0, 1)[:length].double().repeat_interleave(group, 1)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("thd,shd->hts", q[begin:end].double(), keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)[None, :]
        if alibi_slopes is not None:
            scores += alibi_slopes.double()[:, None, None] * (key - position)
        visible = key <= position
        if window:
            visible &= key > position - window
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hts,shd->thd", weights, values).to(q.dtype)
    return out
