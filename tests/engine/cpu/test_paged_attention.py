"""The compiled attention against the torch reference, and its bitwise promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.attention.cpu import CpuPagedAttention
from engine.attention.reference import ReferenceAttention
from engine.kernels.kv_quantization import new_scales, quantized_int8

# Of the largest deviation from float64, for values of variance 1: float32 sums of a few hundred terms; bfloat16 has 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

# Rows (context, new tokens). 31/32/33 surround a tile of keys and two blocks of 16; several prefill rows follow decode
# rows; one row starts at position 0, others continue.
MIXED = [(0, 1), (31, 1), (32, 1), (33, 1), (200, 1), (0, 2), (15, 17), (100, 40), (0, 65)]


@pytest.fixture
def attention(library):
    return CpuPagedAttention(library)


def run(attention, step, window=None):
    """The step's output with its own keys and values stored first."""
    k_cache, v_cache = step.k_cache.clone(), step.v_cache.clone()
    attention.store_kv(step.k, step.v, k_cache, v_cache, step.meta.slot_mapping)
    scale = step.q.shape[-1] ** -0.5
    return attention.forward(step.q, k_cache, v_cache, step.meta, scale=scale, sliding_window=window)


def oracle(step, window=None):
    wide = replace(step, **{n: getattr(step, n).double() for n in ("q", "k", "v", "k_cache", "v_cache")})
    return run(ReferenceAttention(), wide, window)


def one_token_rows(step):
    """The same tokens, each as a decode row of its own over the same blocks."""
    meta = step.meta
    counts = (meta.query_start[1:] - meta.query_start[:-1]).long()
    row_of = torch.repeat_interleave(torch.arange(len(counts)), counts)
    behind = meta.query_start[1:].long()[row_of] - 1 - torch.arange(len(row_of))
    seq_lens = (meta.seq_lens.long()[row_of] - behind).int()
    tokens = len(row_of)
    decode = replace(
        meta,
        query_start=torch.arange(tokens + 1, dtype=torch.int32),
        seq_lens=seq_lens,
        block_tables=meta.block_tables[row_of].contiguous(),
        max_query_len=1,
        num_decode_rows=tokens,
    )
    return replace(step, meta=decode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 7, 48])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block_size"),
    [
        (4, 2, 64, 16),  # the bundled model
        (2, 2, 16, 8),  # no groups; one vector a head on AVX-512
        (8, 2, 80, 16),  # a head size that is no multiple of four vectors
        (7, 1, 128, 32),  # a group that is no power of two; blocks as long as a tile of keys
        (2, 1, 20, 4),  # a head size that is no multiple of any vector; blocks shorter than a vector
        (4, 4, 64, 128),  # blocks longer than a tile
    ],
)
def test_matches_the_reference_in_float64(
    attention, make_step, heads, kv_heads, size, block_size, window, dtype
):
    step = make_step(MIXED, heads=heads, kv_heads=kv_heads, size=size, block_size=block_size, dtype=dtype)
    out = run(attention, step, window)
    assert out.dtype == dtype
    assert (out.double() - oracle(step, window)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 1000])
def test_decode_matches_at_lengths_around_tiles_and_blocks(attention, make_step, length):
    step = make_step([(length - 1, 1)], heads=4, kv_heads=2, size=64, block_size=16, seed=length)
    assert (run(attention, step).double() - oracle(step)).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (7, 1, 80), (2, 2, 20)])
def test_a_token_has_the_same_bits_as_prefill_and_as_decode(
    attention, make_step, heads, kv_heads, size, window, dtype
):
    step = make_step(MIXED, heads=heads, kv_heads=kv_heads, size=size, block_size=16, dtype=dtype)
    assert torch.equal(run(attention, step, window), run(attention, one_token_rows(step), window))


def test_a_row_has_the_same_bits_alone_and_in_a_batch_on_any_number_of_threads(attention, make_step):
    step = make_step(MIXED, heads=4, kv_heads=2, size=64, block_size=16)
    together = run(attention, step)
    k_cache, v_cache = step.k_cache.clone(), step.v_cache.clone()
    attention.store_kv(step.k, step.v, k_cache, v_cache, step.meta.slot_mapping)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for row in range(len(MIXED)):
            first, end = step.meta.query_start[row : row + 2].tolist()
            meta = replace(
                step.meta,
                query_start=torch.tensor([0, end - first], dtype=torch.int32),
                seq_lens=step.meta.seq_lens[row : row + 1].clone(),
                block_tables=step.meta.block_tables[row : row + 1].clone(),
                slot_mapping=step.meta.slot_mapping[first:end].clone(),
            )
            alone = attention.forward(step.q[first:end], k_cache, v_cache, meta, scale=0.125)
            assert torch.equal(alone, together[first:end])
    finally:
        torch.set_num_threads(threads)


def test_the_block_size_does_not_change_a_bit(attention, make_step):
    step = make_step([(200, 1), (40, 60)], heads=4, kv_heads=2, size=64, block_size=16)
    out = run(attention, step)
    assert torch.equal(run(attention, _with_block_size(step, 4)), out)
    assert torch.equal(run(attention, _with_block_size(step, 64)), out)


def _with_block_size(step, block_size):
    """The same tokens in blocks of another size, in order."""
    old = step.k_cache.shape[2]
    lengths = step.meta.seq_lens.tolist()
    counts = [-(-length // block_size) for length in lengths]
    shape = (sum(counts), step.k_cache.shape[1], block_size, step.k_cache.shape[3])
    k_cache, v_cache = torch.zeros(shape), torch.zeros(shape)
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    slots, first = [], 0
    for row, length in enumerate(lengths):
        tables[row, : counts[row]] = torch.arange(first, first + counts[row])
        at = torch.arange(length)
        from_block = step.meta.block_tables[row][at // old].long()
        to = first * block_size + at
        k_cache[to // block_size, :, to % block_size] = step.k_cache[from_block, :, at % old]
        v_cache[to // block_size, :, to % block_size] = step.v_cache[from_block, :, at % old]
        new = int(step.meta.query_start[row + 1] - step.meta.query_start[row])
        slots.append(to[length - new :])
        first += counts[row]
    meta = replace(step.meta, block_tables=tables, slot_mapping=torch.cat(slots))
    return replace(step, k_cache=k_cache, v_cache=v_cache, meta=meta)


def test_queries_may_be_a_view_of_merged_q_k_v(attention, make_step):
    step = make_step([(20, 1), (0, 9)], heads=4, kv_heads=2, size=64, block_size=16)
    merged = torch.cat((step.q, step.k, step.v), dim=1)
    q, k, v = merged.split((4, 2, 2), dim=1)
    assert not q.is_contiguous()
    assert torch.equal(run(attention, replace(step, q=q, k=k, v=v)), run(attention, step))


def test_float64_is_served_by_the_reference(attention, make_step):
    step = make_step([(20, 1), (0, 9)], heads=4, kv_heads=2, size=64, block_size=16, dtype=torch.float64)
    assert torch.equal(run(attention, step), run(ReferenceAttention(), step))


@pytest.mark.parametrize("form", [{"softcap": 0.5}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.1])}])
def test_a_soft_cap_and_alibi_are_served_by_the_reference(attention, make_step, form):
    step = make_step([(20, 1), (0, 9)], heads=4, kv_heads=2, size=64, block_size=16)
    given = (step.q, step.k_cache.nan_to_num(), step.v_cache.nan_to_num(), step.meta)
    out = attention.forward(*given, scale=0.125, **form)
    assert torch.equal(out, ReferenceAttention().forward(*given, scale=0.125, **form))
    assert not torch.equal(out, attention.forward(*given, scale=0.125))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=["fp8", "int8"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [64, 80, 12])  # whole vectors, and not
def test_a_quantized_cache_is_written_to_the_bit_and_read_exactly(attention, make_step, dtype, compute, size):
    """Every kind of number goes in; what comes out is held against float64 over the same stored values."""
    rows = [(0, 1), (0, 31), (0, 70)]
    step = make_step(rows, heads=4, kv_heads=2, size=size, block_size=16, dtype=compute)
    k, v = (x * 10.0 ** (torch.arange(len(x)) % 7 - 4).to(compute)[:, None, None] for x in (step.k, step.v))
    k[3], v[5, 0] = 0.0, 1e-35  # nothing, and too little to be anything
    k[7] *= 1e3  # beyond 448
    found, expected = _stored(attention, k, v, step, dtype), _stored(ReferenceAttention(), k, v, step, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    caches, scales = found[:2], dict(zip(("k_scale", "v_scale"), found[2:], strict=True))
    # Scores of the thousandfold keys are in the hundreds, where float32 is off by 1e-5 and more: small queries.
    q = step.q * 1e-3
    out = attention.forward(q, *caches, step.meta, scale=0.125, **scales)
    want = ReferenceAttention().forward(q.double(), *caches, step.meta, scale=0.125, **scales)
    assert (out.double() - want).abs().max() < TOLERANCE[compute] * want.abs().max()


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (7, 1, 80), (2, 2, 20), (8, 2, 128)])
def test_float32_over_a_bfloat16_cache_is_exact_over_what_it_holds(
    attention, make_step, heads, kv_heads, size, window
):
    step = make_step(MIXED, heads=heads, kv_heads=kv_heads, size=size, block_size=16)
    narrow = replace(step, k_cache=step.k_cache.bfloat16(), v_cache=step.v_cache.bfloat16())
    out = run(attention, narrow, window)
    held = {n: getattr(step, n).bfloat16().double() for n in ("k", "v", "k_cache", "v_cache")}
    want = run(ReferenceAttention(), replace(step, q=step.q.double(), **held), window)
    assert out.dtype == torch.float32
    assert (out.double() - want).abs().max() < TOLERANCE[torch.float32]
    assert torch.equal(out, run(attention, one_token_rows(narrow), window))


def test_int8_is_rounded_after_the_product_and_not_with_it(attention, make_step):
    """Values so near the middle of two codes that a product contracted with the sum behind it would take the other."""
    step = make_step([(0, 4)], heads=2, kv_heads=2, size=64, block_size=16)
    largest = torch.tensor([1.6212530136108398, 1.3784139156341553, 1.5657756328582764, 1.431149959564209])
    x = torch.tensor([1.4106178283691406, 0.8411580920219421, 0.9678219556808472, 1.2564820051193237])
    k = step.k.clamp(-1, 1)
    k[:, :, 0], k[:, :, 1] = largest[:, None], x[:, None]
    values, scale = quantized_int8(k)
    contracted = (x.double() * (torch.full_like(largest, 127.0) / largest).double()).round()
    assert (contracted != values[:, 0, 1]).all()
    k_cache, _, k_scale, _ = _stored(attention, k, step.v, step, torch.int8)
    slots = step.meta.slot_mapping
    assert torch.equal(k_cache[slots // 16, :, slots % 16], values)
    assert torch.equal(k_scale[slots // 16, :, slots % 16], scale)


def _stored(attention, k, v, step, dtype):
    """Caches and scales after a store; fp8's scales are not 1.0, so that they count."""
    caches = [torch.zeros(step.k_cache.shape).to(dtype) for _ in range(2)]
    scales = [new_scales(cache) for cache in caches]
    if dtype == torch.float8_e4m3fn:
        for scale, factor in zip(scales, (0.3, 7.0), strict=True):
            scale *= torch.tensor([1.0, factor])
    attention.store_kv(k, v, *caches, step.meta.slot_mapping, k_scale=scales[0], v_scale=scales[1])
    return [*caches, *scales]


def test_a_nan_in_a_query_is_not_hidden(attention, make_step):
    step = make_step([(20, 1), (30, 1)], heads=4, kv_heads=2, size=64, block_size=16)
    step.q[0, 0, 0] = float("nan")
    out = run(attention, step)
    assert out[0, 0].isnan().all()
    assert not out[0, 2:].isnan().any()
    assert not out[1].isnan().any()
