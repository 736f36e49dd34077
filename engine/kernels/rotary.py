"""Rotary embedding of a step's heads, in place, one token a program.

Value d pairs with d + D/2, as in Hugging Face checkpoints; the angles' cosines and sines come as a table row per token, in
float32, and so is the arithmetic. Reference: `engine.models.layers.rotate` in torch's operations.
Boundary: it rotates whole heads; it computes no angles and stores no cache.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROTARY_WARPS = 4


@triton.jit
def rotary_kernel(
    heads, table, stride_token, NUM_HEADS: tl.constexpr, HALF: tl.constexpr, HEADS_PAD: tl.constexpr, HALF_PAD: tl.constexpr
):  # fmt: skip
    """heads [T, NUM_HEADS, 2 HALF] with the table [T, 2 HALF]: cosines, then sines."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_PAD)
    lane = tl.arange(0, HALF_PAD)
    live = lane < HALF
    cos = tl.load(table + token * (2 * HALF) + lane, mask=live, other=0.0)[None, :]
    sin = tl.load(table + token * (2 * HALF) + HALF + lane, mask=live, other=0.0)[None, :]
    cell = heads + token * stride_token + head[:, None] * (2 * HALF) + lane[None, :]
    inside = (head < NUM_HEADS)[:, None] & live[None, :]
    first = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(cell + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(cell, (first * cos - second * sin).to(heads.dtype.element_ty), mask=inside)
    tl.store(cell + HALF, (second * cos + first * sin).to(heads.dtype.element_ty), mask=inside)


def rotary_constants(num_heads: int, head_size: int) -> dict[str, int]:
    """Compile-time constants; launch and compile tests read them here."""
    half = head_size // 2
    return {
        "NUM_HEADS": num_heads,
        "HALF": half,
        "HEADS_PAD": triton.next_power_of_2(num_heads),
        "HALF_PAD": triton.next_power_of_2(half),
    }


def rotate_in_place(heads: Tensor, table: Tensor) -> None:
    """Rotate heads [T, n, D], which may be a view with any token stride, by its tokens' rows of the table [T, D]."""
    tokens, count, size = heads.shape
    assert heads.stride()[1:] == (size, 1), f"heads of a token are not side by side: {heads.stride()}"
    assert (table.shape, table.dtype) == ((tokens, size), torch.float32), (table.shape, table.dtype)
    assert table.is_contiguous()
    if tokens:
        rotary_kernel[(tokens,)](
            heads,
            table,
            heads.stride(0),
            **rotary_constants(count, size),
            num_warps=ROTARY_WARPS,
            enable_fp_fusion=False,
        )
