"""Random attention steps over a paged KV cache, with every undefined place poisoned, and the judge of their results.

For benchmarks and kernel tests, on any device: rows of given lengths, blocks scattered over the pool. Slots that no token
was written to hold not-a-number, and table entries past a row's last block name a block of it, so that a kernel which
reads what it must not cannot give a finite answer.

Boundary: makes inputs and compares with the reference; runs no backend and knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.attention.interface import AttentionMetadata
from engine.kernels.kv_quantization import FP8_MAX, dequantized, new_scales, store_quantized_kv_ref
from engine.kernels.paged_attention import paged_attention_ref
from engine.kernels.store_kv import store_kv_ref


@dataclass(frozen=True, slots=True)
class PagedStep:
    """One attention step: queries [T, H, D], caches [num_blocks, K, block_size, D] and where everything sits."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    meta: AttentionMetadata
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    def reference(
        self, window: int | None = None, softcap: float | None = None, alibi_slopes: Tensor | None = None
    ) -> Tensor:
        """The result [T, H, D] by the definition."""
        meta = self.meta
        return paged_attention_ref(
            self.q, self.k_cache, self.v_cache, meta.block_tables, meta.seq_lens, meta.query_start,
            scale=self.scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        )  # fmt: skip

    def exact(self) -> PagedStep:
        """The same step with queries in float64, whose reference is not rounded, over the values that its cache means."""
        k_cache, v_cache = self.k_cache, self.v_cache
        if self.k_scale is not None and self.v_scale is not None:
            k_cache = dequantized(k_cache, self.k_scale, torch.float64)
            v_cache = dequantized(v_cache, self.v_scale, torch.float64)
        return PagedStep(self.q.double(), k_cache, v_cache, self.meta)

    def part(self, row: int, begin: int, end: int) -> PagedStep:
        """Tokens begin … end - 1 of a row's tokens in this step, as a step of its own that comes that late."""
        meta = self.meta
        first, past = int(meta.query_start[row]), int(meta.query_start[row + 1])
        length = int(meta.seq_lens[row]) - (past - first) + end
        chosen = slice(first + begin, first + end)
        own = AttentionMetadata(
            query_start=torch.tensor([0, end - begin], dtype=torch.int32, device=self.q.device),
            seq_lens=torch.tensor([length], dtype=torch.int32, device=self.q.device),
            block_tables=meta.block_tables[row : row + 1],
            slot_mapping=meta.slot_mapping[chosen],
            max_query_len=end - begin,
            max_seq_len=length,
            num_decode_rows=int(end - begin == 1),
        )
        return replace(self, q=self.q[chosen], meta=own)


def excess_error(
    got: Tensor, step: PagedStep, window: int | None = None, softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> float:  # fmt: skip
    """The largest error as a share of what rounding allows; above 1, or not-a-number: wrong.

    Weights and result are each rounded once to the queries' dtype with unit roundoff e, sums are float32:
    |error| ≤ e · Σ weight · |v| + e · |result|. Weights over a quantized cache carry the values' scales and are rounded to
    bfloat16, except in float32; the rounding of keys and values themselves is no error here. Scores, exponentials and sums in float32 add about 1e-6 of the same
    magnitude; 1e-5 is allowed. A capped score c · tanh is off by up to 4e-7 · c (exponential, difference, sum, quotient
    and product in float32), and so is each weight and their sum in proportion: 8e-7 · c more.
    """
    exact = step.exact()
    form = (window, softcap, alibi_slopes)
    want, magnitude = exact.reference(*form), replace(exact, v_cache=exact.v_cache.abs()).reference(*form)
    roundoff = weight_roundoff = torch.finfo(got.dtype).eps / 2 if got.dtype != torch.float32 else 0.0
    if roundoff and step.v_scale is not None:
        weight_roundoff = torch.finfo(torch.bfloat16).eps / 2
    summing = 1e-5 + 8e-7 * (softcap or 0.0)
    bound = (1.02 * weight_roundoff + summing) * magnitude + (1.02 * roundoff + summing) * want.abs()
    error = (got.double() - want).abs()
    return float(
        torch.where(error == 0.0, 0.0, error / bound).max()
    )  # a value of exactly zero allows no error


def paged_step(
    rows: Sequence[tuple[int, int]],  # (tokens of the row including this step's, tokens of this step)
    *,
    num_kv_heads: int,
    group: int,
    head_size: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    outliers: float = 1.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> PagedStep:
    """A step over `rows`, standard-normal in q, k and v. Rows of one token must come first, as in a StepPlan.

    Every 16th channel of keys and values is `outliers` times as large. A `cache_dtype` of `QUANTIZED_DTYPES` makes a
    quantized cache, with scales of fp8 that just hold the outliers.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    lengths, queries = [length for length, _ in rows], [query for _, query in rows]
    num_decode = next((i for i, query in enumerate(queries) if query > 1), len(rows))
    assert all(query > 1 for query in queries[num_decode:]), "rows of one token must come first"
    counts = [-(-length // block_size) for length in lengths]
    pool = torch.randperm(sum(counts) + 1, generator=generator, device=device).to(torch.int32)
    tables = pool[-1].repeat(len(rows), max(counts) + 1)  # the last block of the permutation stays poisoned
    for row, begin in enumerate(torch.tensor([0, *counts[:-1]]).cumsum(0).tolist()):
        tables[row, : counts[row]] = pool[begin : begin + counts[row]]

    shape = (len(pool), num_kv_heads, block_size, head_size)
    k_cache, v_cache = (_poisoned(shape, cache_dtype or dtype, device) for _ in range(2))
    k_scale = v_scale = None
    if cache_dtype:
        k_scale, v_scale = (_poisoned_scales(cache, 5.0 * outliers / FP8_MAX) for cache in (k_cache, v_cache))
    slots = [_slots(tables[row], 0, length, block_size) for row, length in enumerate(lengths)]
    for row_slots in slots:
        k, v = (normal(len(row_slots), num_kv_heads, head_size) for _ in range(2))
        k[..., ::16] *= outliers
        v[..., ::16] *= outliers
        if k_scale is None or v_scale is None:
            store_kv_ref(k, v, k_cache, v_cache, row_slots)
        else:
            store_quantized_kv_ref(k, v, k_cache, v_cache, row_slots, k_scale, v_scale)
    meta = AttentionMetadata(
        query_start=torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_tables=tables,
        slot_mapping=torch.cat([row_slots[-query:] for row_slots, query in zip(slots, queries, strict=True)]),
        max_query_len=max(queries),
        max_seq_len=max(lengths),
        num_decode_rows=num_decode,
    )
    q = normal(sum(queries), num_kv_heads * group, head_size)
    return PagedStep(q, k_cache, v_cache, meta, k_scale, v_scale)


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """A cache of not-a-numbers; int8 has none, its scales do."""
    if dtype == torch.int8:
        return torch.full(shape, 127, dtype=dtype, device=device)
    return torch.full(shape, float("nan"), device=device).to(dtype)


def _poisoned_scales(cache: Tensor, fp8_scale: float) -> Tensor:
    return new_scales(cache).fill_(float("nan") if cache.dtype == torch.int8 else fp8_scale)


def _slots(table: Tensor, begin: int, end: int, block_size: int) -> Tensor:
    """Slots [end - begin] of the positions begin … end - 1 of a row."""
    position = torch.arange(begin, end, device=table.device)
    return table[position // block_size].long() * block_size + position % block_size
