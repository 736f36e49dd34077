"""Paged attention in plain torch: the oracle for every other backend, and the fallback on any device.

Decode rows are one gather by block table and two batched products; prefill rows are taken one by one. No loop runs over
tokens. Scores, softmax and sums are float32 (float64 for float64 input).

With ``deterministic=True`` a token's result has the same bits whatever shares the batch, however its prompt was cut: each
token is a query of its own, keys are taken in tiles anchored at absolute positions, and every operation has one fixed
shape. That costs speed; the compiled backends do the same at full speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.interface import AttentionMetadata, check_layout
from engine.kernels.invariant import in_pieces
from engine.kernels.kv_quantization import check_scales, scale_of_tokens, write_quantized

MAX_GATHERED_VALUES = 1 << 26  # keys gathered at once, in values: 256 MiB in float32
KV_TILE = 64  # positions of one tile in deterministic mode
TOKEN_TILE = 16  # tokens of one tile in deterministic mode
NO_SCORE = -1e30  # below any score, yet finite: exp(NO_SCORE - NO_SCORE) is 1, not nan


@dataclass(frozen=True, slots=True)
class _Form:
    """How scores are made of queries and keys, as `AttentionBackend.forward` says."""

    scale: float
    window: int | None
    softcap: float | None
    alibi_slopes: Tensor | None

    def shaped(self, scores: Tensor, distance: Tensor) -> Tensor:
        """Scores [rows, K, H // K, …] capped and biased by how far (negative: earlier) each key is from its query."""
        if self.softcap:
            scores = self.softcap * in_pieces(torch.tanh, scores / self.softcap)
        if self.alibi_slopes is not None:
            slopes = self.alibi_slopes.to(scores.dtype)
            scores = scores + slopes.view(*scores.shape[1:3], *[1] * (scores.ndim - 3)) * distance
        return scores

    def hidden(self, distance: Tensor) -> Tensor:
        """Which keys a query does not see."""
        return distance > 0 if self.window is None else (distance > 0) | (distance <= -self.window)


class _Cache:
    """Keys and values of one layer [num_blocks, K, block_size, D], with their scales where they are quantized."""

    def __init__(
        self, keys: Tensor, values: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.num_blocks, self.num_heads, self.block_size, _ = keys.shape
        self._parts = ((keys, k_scale), (values, v_scale))
        self._dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def take(self, index: Tensor | tuple[Tensor | slice, ...]) -> list[Tensor]:
        """Keys and values at an index of the cache, all D of each, in float64 for float64 and else in float32."""
        taken = []
        for cache, scale in self._parts:
            values = cache[index].to(self._dtype)
            if scale is not None:
                values *= scale_of_tokens(cache, scale)[index][..., None]
            taken.append(values)
        return taken

    def of_rows(self, tables: Tensor, length: int) -> list[Tensor]:
        """Keys and values of each row's first `length` positions, [S, K, length, D]."""
        columns = -(-length // self.block_size)
        # Entries past a row's last block are undefined: any block will do, the mask hides it.
        blocks = tables[:, :columns].long().clamp(0, self.num_blocks - 1)
        # [S, nb, K, B, D] -> [S, K, length, D]
        return [taken.transpose(1, 2).flatten(2, 3)[:, :, :length] for taken in self.take(blocks)]


class ReferenceAttention:
    """Implements ``AttentionBackend`` on any device."""

    name = "reference"
    short_context = 0

    def __init__(self, *, deterministic: bool = False) -> None:
        self.deterministic = deterministic

    def store_kv(
        self,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        """Write k, v [T, K, D] to their slots of the caches [num_blocks, K, block_size, D]."""
        check_layout(k_cache, v_cache)
        check_scales(k_cache, k_scale, v_scale)
        if k_scale is not None and v_scale is not None:
            return write_quantized(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        block_size = k_cache.shape[2]
        block = torch.div(slot_mapping, block_size, rounding_mode="floor")
        offset = slot_mapping - block * block_size
        k_cache[block, :, offset] = k.to(k_cache.dtype)
        v_cache[block, :, offset] = v.to(v_cache.dtype)
        return None

    def forward(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attention of each token over its row's keys at positions ≤ its own: q [T, H, D] -> [T, H, D] in q's dtype."""
        check_layout(k_cache, v_cache)
        check_scales(k_cache, k_scale, v_scale)
        cache = _Cache(k_cache, v_cache, k_scale, v_scale, q.dtype)
        form = _Form(scale, sliding_window, softcap, alibi_slopes)
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        if self.deterministic:
            _forward_tiled(q, cache, meta, form, out)
            return out
        rows = meta.num_decode_rows
        if rows:
            # A decode row's one query stands at its last position.
            last = meta.seq_lens[:rows].long() - 1
            for part in _row_parts(rows, meta.max_seq_len, k_cache):
                keys, values = cache.of_rows(meta.block_tables[part], meta.max_seq_len)
                out[part] = _attend(q[part, None], keys, values, last[part, None], form)[:, 0].to(out.dtype)
        if rows == meta.seq_lens.shape[0]:
            return out
        starts, lengths = meta.query_start.tolist(), meta.seq_lens.tolist()
        for row in range(rows, len(lengths)):
            first, end = starts[row], starts[row + 1]
            keys, values = cache.of_rows(meta.block_tables[row : row + 1], lengths[row])
            chunk = max(1, MAX_GATHERED_VALUES // (q.shape[1] * lengths[row]))
            for begin in range(first, end, chunk):
                stop = min(begin + chunk, end)
                at = torch.arange(begin, stop, device=q.device)[None] + (lengths[row] - end)
                out[begin:stop] = _attend(q[None, begin:stop], keys, values, at, form)[0].to(out.dtype)
        return out

    def prepare_capture(
        self,
        num_tokens: int,
        max_rows: int,
        longest: int,
        num_heads: int,
        head_size: int,
        device: torch.device,
    ) -> None:
        """It keeps nothing between launches."""

    def fits_captured(self, seq_lens: NDArray[np.int32]) -> bool:
        """It keeps nothing between launches."""
        return True


def _row_parts(rows: int, max_seq_len: int, k_cache: Tensor) -> list[slice]:
    per_row = max_seq_len * k_cache.shape[1] * k_cache.shape[3]
    size = max(1, MAX_GATHERED_VALUES // per_row)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def _attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, form: _Form) -> Tensor:
    """q [S, n, H, D] at positions [S, n] over keys, values [S, K, length, D] -> [S, n, H, D]."""
    rows, n, heads, size = q.shape
    groups = heads // keys.shape[1]
    grouped = (
        (q.to(keys.dtype) * form.scale).view(rows, n, keys.shape[1], groups, size).permute(0, 2, 3, 1, 4)
    )
    scores = grouped.flatten(2, 3) @ keys.transpose(2, 3)  # [S, K, groups * n, length]
    distance = torch.arange(keys.shape[2], device=q.device) - positions[..., None]  # [S, n, length]
    hidden = form.hidden(distance)
    scores = form.shaped(scores.view(rows, keys.shape[1], groups, n, -1), distance[:, None, None])
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    # Undefined cache entries may hold nan: 0 * nan is nan, so hidden values are cleared and not only weighted by 0.
    seen = ~hidden.all(dim=1)
    weights = scores.softmax(dim=-1).flatten(2, 3)
    mixed = weights @ values.masked_fill(~seen[:, None, :, None], 0.0)
    return (
        mixed.view(rows, keys.shape[1], groups, n, size).permute(0, 3, 1, 2, 4).reshape(rows, n, heads, size)
    )


def _forward_tiled(
    q: Tensor,
    cache: _Cache,
    meta: AttentionMetadata,
    form: _Form,
    out: Tensor,
) -> None:
    """Every token as its own row, TOKEN_TILE tokens and KV_TILE keys at a time, online softmax."""
    tokens = q.shape[0]
    lengths = (meta.query_start[1:] - meta.query_start[:-1]).long()
    row_of = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths, output_size=tokens)
    behind = meta.query_start[1:].long()[row_of] - torch.arange(tokens, device=q.device)
    positions = meta.seq_lens.long()[row_of] - behind
    for first in range(0, tokens, TOKEN_TILE):
        # The last tile repeats its last token, so that each tile has the same shape.
        index = torch.arange(first, first + TOKEN_TILE, device=q.device).clamp(max=tokens - 1)
        # Keys that no token sees change no bit: captured work takes as many as there may ever be.
        end = meta.max_seq_len if meta.is_captured else int(positions[index].max()) + 1
        tile = _attend_tile(q[index], cache, meta.block_tables[row_of[index]], positions[index], end, form)
        out[first : first + TOKEN_TILE] = tile[: tokens - first].to(out.dtype)


def _attend_tile(
    q: Tensor,
    cache: _Cache,
    tables: Tensor,
    positions: Tensor,
    end: int,
    form: _Form,
) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    tokens, heads, size = q.shape
    query = (q.to(dtype) * form.scale).view(tokens, cache.num_heads, -1, 1, size)
    total = torch.zeros(*query.shape[:4], dtype=dtype, device=q.device)
    best = torch.full_like(total, NO_SCORE)
    mixed = torch.zeros(*total.shape[:3], size, dtype=dtype, device=q.device)
    for first in range(0, end, KV_TILE):
        at = torch.arange(first, first + KV_TILE, device=q.device)
        column = (at // cache.block_size).clamp(max=tables.shape[1] - 1)
        blocks = tables[:, column].long().clamp(0, cache.num_blocks - 1)  # [t, KV_TILE]
        distance = at - positions[:, None]
        hidden = form.hidden(distance)
        keys, values = (
            taken.permute(0, 2, 1, 3)[:, :, None]  # [t, K, 1, KV_TILE, D]
            for taken in cache.take((blocks, slice(None), at % cache.block_size))
        )
        scores = form.shaped((query * keys).sum(dim=-1), distance[:, None, None])
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        new_best = torch.maximum(best, scores.amax(dim=-1, keepdim=True))
        weights = in_pieces(torch.exp, scores - new_best)
        # A tile that a token does not see leaves its sums as they are, to the bit: factor 1, summand 0.
        factor = in_pieces(torch.exp, best - new_best)
        total = total * factor + weights.sum(dim=-1, keepdim=True)
        values = values.masked_fill(hidden[:, None, None, :, None], 0.0)
        mixed = mixed * factor + (weights[..., None] * values).sum(dim=-2)
        best = new_best
    return (mixed / total).view(tokens, heads, size)
