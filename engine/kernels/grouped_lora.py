"""LoRA over a batch of many adapters on a GPU, in two launches a layer: x Aᵀ of every token, then what its B makes of it.

A program takes tokens of one slot, listed by slot; how many there are it reads on the device, and one without tokens ends
at once. So launches follow from the number of tokens alone and can be captured. The first kernel splits the sum over `in`,
because few tokens would leave most of the device idle, and the second adds the pieces up in their order: tile shapes and
splits follow from the layer alone, and a token keeps its bits whatever shares its step.

Boundary: sums in float32. Definition and torch reference: `engine.kernels.lora`.
Source of the idea: Chen et al., "Punica: Multi-Tenant LoRA Serving", 2023.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.lora import SlotWeights, TokenSlots

MAX_PARTS = 3
MAX_SPLITS = 4  # each split is written once and read by every tile of outputs
SPLIT_SIZE = 512  # inputs that are worth a program of their own
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def lora_shrink_kernel(
    low, x, a, order, starts, num_tokens, stride_x, stride_slot,
    IN: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """low [SPLITS, T, COLUMNS]: x Aᵀ of the tokens in the order of their slots, a split's share of `in` each.

    Program (tile of a slot's tokens, tile of columns and split, slot).
    """
    slot = tl.program_id(2)
    first = tl.load(starts + slot) + tl.program_id(0) * BLOCK_M
    end = tl.load(starts + slot + 1)
    if first < end:
        place = first + tl.arange(0, BLOCK_M)
        real = place < end
        token = tl.load(order + place, mask=real, other=0).to(tl.int64)
        split = tl.program_id(1) % SPLITS
        column = tl.program_id(1) // SPLITS * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < COLUMNS
        depth = split * DEPTH + tl.arange(0, BLOCK_K)
        x_at = x + token[:, None] * stride_x + depth[None, :]
        a_at = a + slot.to(tl.int64) * stride_slot + column[None, :] * IN + depth[:, None]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, DEPTH, BLOCK_K):
            near = begin + depth < IN
            left = tl.load(x_at + begin, mask=real[:, None] & near[None, :], other=0.0)
            right = tl.load(a_at + begin, mask=inside[None, :] & near[:, None], other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        target = low + (split * num_tokens + place).to(tl.int64)[:, None] * COLUMNS + column[None, :]
        tl.store(target, acc, mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def lora_expand_kernel(
    y, low, b, scales, order, starts, num_tokens, stride_y, stride_slot, stride_scale,
    SIZE0: tl.constexpr, SIZE1: tl.constexpr, SIZE2: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y += scale · low Bᵀ. Program (tile of a slot's tokens, tile of one part's outputs, slot)."""
    slot = tl.program_id(2)
    first = tl.load(starts + slot) + tl.program_id(0) * BLOCK_M
    end = tl.load(starts + slot + 1)
    if first < end:
        tiles0: tl.constexpr = (SIZE0 + BLOCK_N - 1) // BLOCK_N
        tiles1: tl.constexpr = (SIZE1 + BLOCK_N - 1) // BLOCK_N
        tile = tl.program_id(1)
        part = (tile >= tiles0).to(tl.int32) + (tile >= tiles0 + tiles1).to(tl.int32)
        within = tl.where(part == 0, tile, tl.where(part == 1, tile - tiles0, tile - tiles0 - tiles1))
        before = tl.where(part == 0, 0, tl.where(part == 1, SIZE0, SIZE0 + SIZE1))
        size = tl.where(part == 0, SIZE0, tl.where(part == 1, SIZE1, SIZE2))
        place = first + tl.arange(0, BLOCK_M)
        real = place < end
        token = tl.load(order + place, mask=real, other=0).to(tl.int64)
        column = within * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < size
        rank = tl.arange(0, BLOCK_R)
        known = rank < RANK
        low_at = low + place.to(tl.int64)[:, None] * COLUMNS + part * RANK + rank[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for split in range(SPLITS):
            piece = low_at + split * num_tokens.to(tl.int64) * COLUMNS
            total += tl.load(piece, mask=real[:, None] & known[None, :], other=0.0)
        left = (total * tl.load(scales + slot * stride_scale + part)).to(b.dtype.element_ty)
        b_at = (
            b
            + slot.to(tl.int64) * stride_slot
            + (before + column).to(tl.int64)[None, :] * RANK
            + rank[:, None]
        )
        right = tl.load(b_at, mask=inside[None, :] & known[:, None], other=0.0)
        delta = tl.dot(left, right, input_precision="ieee")
        target = y + token[:, None] * stride_y + (before + column)[None, :]
        kept = real[:, None] & inside[None, :]
        old = tl.load(target, mask=kept, other=0.0).to(tl.float32)
        tl.store(target, (old + delta).to(y.dtype.element_ty), mask=kept)


def shrink_constants(size_in: int, columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time constants of the first kernel; launch and compile tests read them here. Chosen from the layer alone."""
    # float32 multiplies outside the matrix units: small tiles, exactness before speed.
    block_m, block_k = (32, 128) if dtype != torch.float32 else (16, 32)
    splits = max(1, min(MAX_SPLITS, size_in // SPLIT_SIZE))
    return {
        "IN": size_in,
        "COLUMNS": columns,
        "SPLITS": splits,
        "DEPTH": triton.cdiv(triton.cdiv(size_in, splits), block_k) * block_k,
        "BLOCK_M": block_m,
        "BLOCK_N": max(16, min(64, triton.next_power_of_2(columns))),
        "BLOCK_K": block_k,
    }


def expand_constants(sizes: tuple[int, ...], rank: int, splits: int, dtype: torch.dtype) -> dict[str, int]:
    """The same of the second kernel, for parts of these sizes."""
    assert len(sizes) <= MAX_PARTS, sizes
    first, second, third = (*sizes, *[0] * (MAX_PARTS - len(sizes)))
    wide = dtype != torch.float32 and rank <= 64
    return {
        "SIZE0": first,
        "SIZE1": second,
        "SIZE2": third,
        "RANK": rank,
        "COLUMNS": len(sizes) * rank,
        "SPLITS": splits,
        "BLOCK_M": 32 if dtype != torch.float32 else 16,
        "BLOCK_N": 128 if wide else 32,
        "BLOCK_R": max(16, rank),
    }


LORA_OPTIONS = {"num_warps": 4, "num_stages": 3}


def lora_add(y: Tensor, x: Tensor, weights: SlotWeights, tokens: TokenSlots) -> None:
    """Add to y [T, out] what the adapters of its tokens make of x [T, in]. Rows of both may have any stride."""
    a, b, scales, sizes = weights.a, weights.b, weights.scales, weights.sizes
    (num_slots, columns, size_in), rank, num_tokens = a.shape, weights.rank, x.shape[0]
    assert x.dtype == y.dtype == a.dtype == b.dtype, (x.dtype, y.dtype, a.dtype, b.dtype)
    assert x.dtype in DTYPES, x.dtype
    assert (x.shape, y.shape) == ((num_tokens, size_in), (num_tokens, sum(sizes))), (x.shape, y.shape)
    assert x.stride(1) == y.stride(1) == 1, (x.stride(), y.stride())
    assert a.stride()[1:] == (size_in, 1), a.stride()
    assert b.stride()[1:] == (rank, 1), b.stride()
    assert scales.stride(1) == 1, scales.stride()
    if not num_tokens:
        return
    shrink = shrink_constants(size_in, columns, x.dtype)
    expand = expand_constants(sizes, rank, shrink["SPLITS"], x.dtype)
    low = torch.empty(shrink["SPLITS"], num_tokens, columns, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(num_tokens, shrink["BLOCK_M"])
    grid = (tiles, triton.cdiv(columns, shrink["BLOCK_N"]) * shrink["SPLITS"], num_slots)
    lora_shrink_kernel[grid](
        low, x, a, tokens.order, tokens.starts, num_tokens, x.stride(0), a.stride(0), **shrink, **LORA_OPTIONS
    )  # fmt: skip
    grid = (tiles, sum(triton.cdiv(size, expand["BLOCK_N"]) for size in sizes), num_slots)
    lora_expand_kernel[grid](
        y, low, b, scales, tokens.order, tokens.starts, num_tokens, y.stride(0), b.stride(0), scales.stride(0),
        **expand, **LORA_OPTIONS,
    )  # fmt: skip
