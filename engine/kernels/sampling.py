"""Choose one token per row on the device: nothing is sorted, nothing is asked of the host, launches never depend on data.

Semantics and noise are `engine.runner.sampler`'s. A row's tokens are cut into parts, one program each, so that one row of a
large vocabulary fills a GPU; a second kernel merges the parts' winners. Rows with filters are searched first
(`engine.kernels.sampling_filters`): 2 launches without filters, 20 with them, 30 with typical_p.

A row's token depends on its own logits and settings alone. It equals that of another implementation but where

- two tokens' sums of value and noise are within the rounding of their logarithms (4 units in the last place of the larger term),
- a token's probability is within 1e-6 of min_p times the largest, or
- the probability before it, in the order of likelihood or of distance, is within 1e-5 of top_p or typical_p: float32 sums are
  rounded, ours are integers; and so are two tokens' distances from the mean, where they are nearly equal.

Not-a-number counts as -inf. Where every allowed token is -inf, the lowest allowed id is chosen; where none is allowed, 0.

Boundary: logits and settings in, tokens out; no penalties, no log-probabilities (`engine.kernels.logprobs`), no rows.
Shapes: n rows to choose for, R rows of settings, V vocabulary.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels import gumbel
from engine.kernels.gumbel import MIN_TEMPERATURE, gumbel_noise, mix_keys
from engine.kernels.sampling_filters import (
    NUM_DIGITS,
    ROW_WORDS,
    TYPICAL_WORDS,
    keep_ref,
    kept,
    kept_typical,
    load_scaled,
    narrow_kernel,
    parts_of,
    typical_kernel,
)

WARPS = 4

# Kernels read globals of this type only.
_A = tl.constexpr(gumbel.MULTIPLIER_A)
_B = tl.constexpr(gumbel.MULTIPLIER_B)
_SEED = tl.constexpr(gumbel.SEED_OFFSET)
_POSITION = tl.constexpr(gumbel.POSITION_OFFSET)
_MOST = tl.constexpr(gumbel.LARGEST_U)


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How each of R rows samples; device tensors [R], of which a step reads some rows."""

    temperature: Tensor  # float32; 0: greedy
    top_k: Tensor  # int32; 0: all
    top_p: Tensor  # float32; 1: all
    min_p: Tensor  # float32; 0: all
    typical_p: Tensor  # float32; 1: all
    seed_low: Tensor  # int32, the bits of the seed's lower half
    seed_high: Tensor  # int32


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * _A
    x = x ^ (x >> 15)
    x = x * _B
    return x ^ (x >> 16)


@triton.jit
def gumbel_of(ids, seed_low, seed_high, position):
    """Noise of token ids under one row's seed and position, all int32."""
    at = position.to(tl.uint32, bitcast=True)
    mixed = _mix(seed_low.to(tl.uint32, bitcast=True) + _SEED)
    key0 = _mix(mixed ^ at)
    key1 = _mix(_mix(seed_high.to(tl.uint32, bitcast=True) ^ mixed) ^ _mix(at + _POSITION))
    hashed = _mix(_mix(ids.to(tl.uint32, bitcast=True) ^ key0) + key1)
    u = tl.minimum((hashed.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _MOST)  # 2^-32
    # log1p made of log: what 1 - u has lost of u cancels in the quotient (Kahan).
    rest = 1.0 - u
    lost = tl.where(rest == 1.0, 1.0, 1.0 - rest)
    return -tl.log(tl.where(rest == 1.0, u, -tl.log(rest) * (u / lost)))


@triton.jit(do_not_specialize=["rows", "positions"])
def draw_kernel(
    best, best_id, typical, work, counts, logits, rows, positions, temperature, top_p, typical_p, seed_low, seed_high, mask,
    vocab, stride_logits, stride_mask,
    IS_FILTERED: tl.constexpr, IS_TYPICAL: tl.constexpr, HAS_MASK: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The winner of each part: its sum to `best` and its id to `best_id` (V where nothing is kept). Axes: (row, part)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    place = row * tl.num_programs(1) + part
    setting = tl.load(rows + row)
    heat = tl.load(temperature + setting)
    ids = part * TILE + tl.arange(0, TILE)
    x, allowed = load_scaled(
        logits + row * stride_logits, mask + row * stride_mask, ids, vocab, heat, HAS_MASK
    )
    if heat > 0.0:
        if IS_FILTERED:
            allowed = kept(x, allowed, work, counts, row, part, tl.load(top_p + setting), PARTS)
            if IS_TYPICAL:
                allowed = kept_typical(x, allowed, typical, work, row, tl.load(typical_p + setting))
            x = tl.where(allowed, x, float("-inf"))
        x += gumbel_of(
            ids, tl.load(seed_low + setting), tl.load(seed_high + setting), tl.load(positions + row)
        )
    top = tl.max(x, 0)
    tl.store(best + place, top)
    tl.store(best_id + place, tl.min(tl.where(allowed & (x == top), ids, vocab), 0))


@triton.jit(do_not_specialize=["out"])
def merge_kernel(out, best, best_id, vocab, num_parts, PARTS: tl.constexpr):
    """The winner among a row's parts, the lowest id among equals. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    inside = parts < num_parts
    sums = tl.load(best + row * num_parts + parts, mask=inside, other=float("-inf"))
    ids = tl.load(best_id + row * num_parts + parts, mask=inside, other=vocab)
    winner = tl.min(tl.where(sums == tl.max(sums, 0), ids, vocab), 0)
    tl.store(out + row, tl.where(winner == vocab, 0, winner))


def sample_tokens(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    settings: RowSettings,
    out: Tensor,
    *,
    is_filtered: bool,
    is_typical: bool = False,
    mask: Tensor | None = None,
) -> None:
    """Write to `out` [n] int32 the tokens chosen from float32 logits [n, V], row i under the settings of ``rows[i]``.

    `positions` [n] int32 are those of the tokens to be chosen. `is_filtered` False promises that no row has top_k, top_p,
    min_p or typical_p, `is_typical` False that none has typical_p. Bit ``j % 32`` of ``mask[i, j // 32]`` (int32) says that token j may be chosen; None allows all.

    Launches follow from shapes and Python arguments; workspace comes from torch's allocator: a CUDA graph can hold all of it.
    """
    _check(logits, rows, positions, settings, out, mask)
    assert is_filtered or not is_typical, "typical_p is a filter"
    n, vocab = logits.shape
    if n == 0:
        return
    tile, parts = parts_of(vocab)
    device = logits.device
    best = torch.empty(n, parts, dtype=torch.float32, device=device)
    best_id = torch.empty(n, parts, dtype=torch.int32, device=device)
    work = counts = best_id  # not read without filters
    bits, stride_mask = (best_id, 0) if mask is None else (mask, mask.stride(0))
    forms = {"HAS_MASK": mask is not None, "TILE": tile, "num_warps": WARPS}
    padded = triton.next_power_of_2(parts)
    typical = work
    if is_filtered:
        work = torch.zeros(n, ROW_WORDS, dtype=torch.int64, device=device)
        counts = torch.empty(n, parts, dtype=torch.int32, device=device)
        for by_mass, num_passes in ((False, NUM_DIGITS), (True, NUM_DIGITS + 1)):
            for index in range(num_passes):
                narrow_kernel[(n, parts)](
                    work, counts, logits, rows, settings.temperature, settings.top_k, settings.top_p, settings.min_p,
                    bits, vocab, logits.stride(0), stride_mask, index,
                    FIRST=index == 0, BY_MASS=by_mass, **forms,
                )  # fmt: skip
    if is_typical:
        typical = torch.zeros(n, TYPICAL_WORDS, dtype=torch.int64, device=device)
        for index in (-1, *range(NUM_DIGITS)):
            typical_kernel[(n, parts)](
                typical, work, counts, logits, rows, settings.temperature, settings.top_p, settings.typical_p, bits, vocab,
                logits.stride(0), stride_mask, index, FIRST=index < 0, PARTS=padded, **forms,
            )  # fmt: skip
    draw_kernel[(n, parts)](
        best, best_id, typical, work, counts, logits, rows, positions, settings.temperature, settings.top_p,
        settings.typical_p, settings.seed_low, settings.seed_high, bits, vocab, logits.stride(0), stride_mask,
        IS_FILTERED=is_filtered, IS_TYPICAL=is_typical, PARTS=padded, **forms,
    )  # fmt: skip
    merge_kernel[(n,)](out, best, best_id, vocab, parts, PARTS=padded, num_warps=1)


def sample_tokens_ref(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    settings: RowSettings,
    out: Tensor,
    *,
    is_filtered: bool,
    is_typical: bool = False,
    mask: Tensor | None = None,
) -> None:
    """The same in torch by sorting, on any device: static shapes, and no value goes to the host."""
    _check(logits, rows, positions, settings, out, mask)
    ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None:
        allowed = (mask[:, ids // 32] >> (ids % 32)) & 1 != 0
    index = rows.long()
    temperature = settings.temperature[index][:, None]
    is_drawn = temperature > 0.0
    scaled = torch.where(allowed & ~logits.isnan(), logits, float("-inf"))
    scaled = scaled / torch.where(is_drawn, temperature.clamp(min=MIN_TEMPERATURE), 1.0)
    if is_filtered:
        filters = (settings.top_k[index], settings.top_p[index], settings.min_p[index])
        typical_p = settings.typical_p[index] if is_typical else None
        allowed = allowed & (keep_ref(scaled, allowed, *filters, typical_p) | ~is_drawn)
    keys = mix_keys(settings.seed_low[index], settings.seed_high[index], positions)
    sums = scaled + torch.where(is_drawn, gumbel_noise(keys, ids, torch.float32), 0.0)
    sums = torch.where(allowed, sums, float("-inf"))
    out.copy_((allowed & (sums == sums.amax(dim=-1, keepdim=True))).int().argmax(dim=-1))


def _check(
    logits: Tensor, rows: Tensor, positions: Tensor, settings: RowSettings, out: Tensor, mask: Tensor | None
) -> None:
    n, vocab = logits.shape
    assert logits.dtype == torch.float32, logits.dtype
    assert logits.stride(1) == 1, logits.stride()
    for tensor in (rows, positions, out):
        assert (tensor.dtype, tensor.shape) == (torch.int32, (n,)), (tensor.dtype, tensor.shape, n)
        assert tensor.is_contiguous()
    for tensor in (settings.temperature, settings.top_p, settings.min_p, settings.typical_p):
        assert tensor.dtype == torch.float32, tensor.dtype
    for tensor in (settings.top_k, settings.seed_low, settings.seed_high):
        assert tensor.dtype == torch.int32, tensor.dtype
    if mask is not None:
        words = -(-vocab // 32)
        assert (mask.dtype, mask.shape, mask.stride(1)) == (torch.int32, (n, words), 1), (
            mask.dtype,
            mask.shape,
        )
