"""How paged attention is cut into tiles: one table that the launch, the compile tests and the benchmark read.

A *tile* is BLOCK_M packed query rows (tokens times the query heads that share a KV head) against BLOCK_N keys. A
*split* is SPLIT_TOKENS keys, anchored at absolute positions: key p belongs to split p // SPLIT_TOKENS whatever the
context, the window or the rest of the batch, so that a row's decode result does not depend on its neighbours.

Boundary: numbers only, chosen from shapes and dtype, never from the batch. Nothing here launches.
Source: shapes follow from the memory of one sm_90 multiprocessor (227 KB shared, 64 K registers); they have been
compiled for it but not yet timed on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kernels.kv_quantization import QUANTIZED_DTYPES

# A multiple of every BLOCK_N; partial results cost about 1.6 % of the KV read at 4 heads a group.
SPLIT_TOKENS = 512
SUM_ROWS = 128  # rows whose splits a program counts at a time, to find where its own row's partials begin
# Programs of a captured launch, whose grid must not know the contexts: at least four for each multiprocessor of a large
# GPU. More would help a long context among short rows, and would find nothing to do in all other steps.
CAPTURED_PROGRAMS = 4 * 132
COMBINE_STAGES = 8  # partials in flight in the combine kernel, which merges them one by one
COMBINE_WARPS = 1


class Mode(Enum):
    """What one launch computes."""

    DECODE = "decode"  # one token a row, programs share its splits; partials go to the combine kernel
    DECODE_DIRECT = "decode_direct"  # one token a row, contexts of one split: straight to the output
    PREFILL = "prefill"  # several tokens a row, one program a query tile over all its keys

    @property
    def is_decode(self) -> bool:
        return self is not Mode.PREFILL


@dataclass(frozen=True, slots=True)
class Tile:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a model fixes: K KV heads, H // K query heads each, D head size, block size, dtypes, how scores are formed.

    `dtype` is the queries'; the cache has it too unless `cache_dtype` names a quantized one.
    """

    num_kv_heads: int
    group: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    cache_dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of the attention kernel. Tensors that it does without are among its constants, as None."""

    constants: dict[str, int | float | bool | str | None]
    options: dict[str, int | bool]

    @property
    def tokens_per_tile(self) -> int:
        tokens = self.constants["BLOCK_Q"]
        assert isinstance(tokens, int)
        return tokens


# Padded head size -> tile, for the 16-bit dtypes. Decode takes the smallest tile that the matrix units have; prefill
# fills two warpgroups; one shape must do both in deterministic mode. num_stages counts the block-table load, the wait
# for it and the product too: 5 keeps two tiles of keys and values in flight, 3 and 4 only one.
_DECODE = {64: Tile(16, 128, 4, 5), 128: Tile(16, 32, 4, 5), 256: Tile(16, 32, 4, 5)}
_PREFILL = {64: Tile(128, 64, 8, 5), 128: Tile(128, 64, 8, 5), 256: Tile(64, 64, 8, 2)}
_UNIFORM = {64: Tile(64, 64, 4, 5), 128: Tile(64, 32, 4, 5), 256: Tile(64, 32, 8, 2)}
# float32 multiplies outside the matrix units (they would round to 10 bits): small tiles, exactness before speed.
_FLOAT32 = Tile(16, 32, 8, 2)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256


def padded_head_size(head_size: int) -> int:
    """The power of two, at least 16, that tiles of this head size occupy."""
    return max(16, 1 << (head_size - 1).bit_length())


def tile_for(shape: AttentionShape, mode: Mode, deterministic: bool) -> Tile:
    """The tile of a launch; its BLOCK_M grows where one group of heads would not fit."""
    if shape.dtype == torch.float32:
        tile = _FLOAT32
    else:
        table = _UNIFORM if deterministic else _DECODE if mode.is_decode else _PREFILL
        tile = table[max(64, padded_head_size(shape.head_size))]
    rows = max(tile.block_m, 1 << (shape.group - 1).bit_length())
    return Tile(rows, tile.block_n, tile.num_warps, tile.num_stages)


@lru_cache(maxsize=256)
def variant(shape: AttentionShape, mode: Mode, deterministic: bool) -> Variant:
    """Constants and compile options of one launch.

    Deterministic: prefill uses decode's tile and folds its keys split by split, as decode and combine do, so that the
    same position gets the same bits from either.
    """
    tile = tile_for(shape, mode, deterministic)
    constants: dict[str, int | float | bool | str | None] = {
        "NUM_KV_HEADS": shape.num_kv_heads,
        "GROUP": shape.group,
        "HEAD_SIZE": shape.head_size,
        "HEAD_PAD": padded_head_size(shape.head_size),
        "BLOCK_SIZE": shape.block_size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_Q": 1 if mode.is_decode else tile.block_m // shape.group,
        "SPLIT": SPLIT_TOKENS,
        "SUM_ROWS": SUM_ROWS,
        "WINDOW": shape.window or 0,
        "SOFTCAP": shape.softcap or 0.0,
        "CACHE": QUANTIZED_DTYPES[shape.cache_dtype] if shape.cache_dtype else "",
        "PREFILL": not mode.is_decode,
        "PARTIAL": mode is Mode.DECODE,
        "BY_SPLIT": deterministic and not mode.is_decode,
        "UNMASKED_BODY": not mode.is_decode and not deterministic and not shape.window,
    }
    if not shape.alibi:
        constants["alibi_slopes"] = None
    if not shape.cache_dtype:
        constants |= {"k_scale": None, "v_scale": None}
    exact = mode.is_decode or deterministic
    return Variant(constants, _options(tile.num_warps, tile.num_stages, fuse=not exact))


@lru_cache(maxsize=256)
def combine_variant(shape: AttentionShape) -> Variant:
    """Constants and compile options of the kernel that merges a row's splits."""
    constants: dict[str, int | float | bool | str | None] = {
        "NUM_HEADS": shape.num_kv_heads * shape.group,
        "HEAD_SIZE": shape.head_size,
        "HEAD_PAD": padded_head_size(shape.head_size),
        "SPLIT": SPLIT_TOKENS,
        "SUM_ROWS": SUM_ROWS,
        "WINDOW": shape.window or 0,
        "STAGES": COMBINE_STAGES,
    }
    return Variant(constants, _options(COMBINE_WARPS, 1, fuse=False))


def max_splits(max_seq_len: int, window: int | None) -> int:
    """Most splits that one token's keys can touch: of the context, or of a window lying anywhere in it."""
    splits = -(-max_seq_len // SPLIT_TOKENS)
    if window:
        splits = min(splits, (window + SPLIT_TOKENS - 2) // SPLIT_TOKENS + 1)
    return max(1, splits)


def num_partials(seq_lens: NDArray[np.int32]) -> int:
    """Partial results that a decode step over rows [S] of these lengths writes, at most (a window writes fewer).

    For the caller of a captured step, whose workspace was reserved: padding rows have length 1 and count too.
    """
    return int((-(-seq_lens.astype(np.int64) // SPLIT_TOKENS)).sum())


def captured_split_programs(num_rows: int, num_kv_heads: int, splits: int) -> int:
    """Programs that share the splits of one row and KV head in a captured launch: from 1 to `splits`."""
    return min(splits, -(-CAPTURED_PROGRAMS // (num_rows * num_kv_heads)))


def _options(num_warps: int, num_stages: int, *, fuse: bool) -> dict[str, int | bool]:
    """Without `fuse` no multiplication is contracted into an addition: which ones would be is the compiler's choice,
    kernel by kernel, and results that must agree to the bit between kernels cannot depend on it."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fuse}
