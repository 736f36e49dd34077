"""A mixture's products on a GPU: every row times the matrix of its own expert, all experts in one launch.

Rows come sorted by expert, and where each expert's rows start is read on the device: the grid is as large as it may have to be,
and a program finds its expert by counting tiles, so that nothing waits for the host and a captured step may route otherwise. A
program sums over the whole of `in` from left to right, in tiles that no number of rows changes: a row's bits do not depend on the
rows beside it.

Boundary: one dtype for rows and weights, float32 sums, no bias. Reference: `expert_linear_ref`. Routing and what is
done between the products: ``engine.models.experts``.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expert_linear_ref(x: Tensor, weight: Tensor, starts: Tensor, rows: Tensor | None = None) -> Tensor:
    """Row i of the result is row i of x, or with `rows` row ``rows[i]``, times the matrix of the expert e with
    ``starts[e] <= i < starts[e + 1]``. x [T, in], weight [E, out, in], starts [E + 1] -> [N, out]."""
    x = x if rows is None else x[rows]
    ranges = enumerate(pairwise(starts.tolist()))
    parts = [x[first:end] @ weight[index].T for index, (first, end) in ranges]
    return torch.cat(parts)


@triton.jit(do_not_specialize=["stride_x"])
def expert_linear_kernel(
    out, x, weight, starts, rows, stride_x,
    IN: tl.constexpr, OUT: tl.constexpr, NUM_EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr,
    GATHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, j): tile i of all experts' rows, counted expert by expert, by BLOCK_N outputs."""
    tile = tl.program_id(0)
    expert = tl.arange(0, EXPERTS_PAD)
    first = tl.load(starts + expert, mask=expert < NUM_EXPERTS, other=0)
    last = tl.load(starts + expert + 1, mask=expert < NUM_EXPERTS, other=0)
    tile_ends = tl.cumsum((last - first + BLOCK_M - 1) // BLOCK_M, 0)
    is_before = tile_ends <= tile
    own = tl.sum(is_before.to(tl.int32), 0)
    if own >= NUM_EXPERTS:  # more tiles than rows fill
        return
    begin = (tile - tl.max(tl.where(is_before, tile_ends, 0), 0)) * BLOCK_M
    row = tl.sum(tl.where(expert == own, first, 0), 0) + begin + tl.arange(0, BLOCK_M)
    real_row = row < tl.sum(tl.where(expert == own, last, 0), 0)
    source = row
    if GATHER:
        source = tl.load(rows + row, mask=real_row, other=0)

    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    real_column = column < OUT
    x_at = x + source.to(tl.int64)[:, None] * stride_x + depth[None, :]
    weight_at = weight + own.to(tl.int64) * (OUT * IN) + column.to(tl.int64)[None, :] * IN + depth[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, IN, BLOCK_K):
        if IN % BLOCK_K == 0:
            left = tl.load(x_at, mask=real_row[:, None], other=0.0)
            right = tl.load(weight_at, mask=real_column[None, :], other=0.0)
        else:
            inside = at + depth < IN
            left = tl.load(x_at, mask=real_row[:, None] & inside[None, :], other=0.0)
            right = tl.load(weight_at, mask=real_column[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K
    target = out + row.to(tl.int64)[:, None] * OUT + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=real_row[:, None] & real_column[None, :])


def expert_constants(
    size_in: int, size_out: int, num_experts: int, dtype: torch.dtype, *, gather: bool
) -> dict[str, int]:
    """Compile-time constants; launch and compile tests read them here. Chosen from the weights alone."""
    # Experts have few rows each but in long prompts; float32 multiplies outside the matrix units.
    block = (32, 64, 64) if dtype != torch.float32 else (16, 32, 32)
    return {
        "IN": size_in,
        "OUT": size_out,
        "NUM_EXPERTS": num_experts,
        "EXPERTS_PAD": triton.next_power_of_2(num_experts),
        "GATHER": gather,
        "BLOCK_M": block[0],
        "BLOCK_N": block[1],
        "BLOCK_K": block[2],
    }


def expert_options(dtype: torch.dtype) -> dict[str, int]:
    """Compile options of a product."""
    return {"num_warps": 4, "num_stages": 4 if dtype != torch.float32 else 2}


def expert_linear(x: Tensor, weight: Tensor, starts: Tensor, rows: Tensor | None = None) -> Tensor:
    """As `expert_linear_ref`, for x [T, in] with any row stride, contiguous weight [E, out, in], starts [E + 1] and rows [N]
    of one integer type; without `rows` N is T. The last start is N."""
    num_experts, size_out, size_in = weight.shape
    num_rows = x.shape[0] if rows is None else rows.shape[0]
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    assert x.dtype in DTYPES, x.dtype
    assert (x.shape[1], x.stride(1)) == (size_in, 1), (x.shape, x.stride())
    assert weight.is_contiguous()
    assert (starts.shape, starts.is_contiguous()) == ((num_experts + 1,), True), starts.shape
    assert rows is None or rows.is_contiguous()
    out = torch.empty(num_rows, size_out, dtype=x.dtype, device=x.device)
    if num_rows:
        constants = expert_constants(size_in, size_out, num_experts, x.dtype, gather=rows is not None)
        # Each expert that has rows fills up one tile at most.
        tiles = triton.cdiv(num_rows, constants["BLOCK_M"]) + min(num_experts, num_rows)
        expert_linear_kernel[(tiles, triton.cdiv(size_out, constants["BLOCK_N"]))](
            out,
            x,
            weight,
            starts,
            x if rows is None else rows,
            x.stride(0),
            **constants,
            **expert_options(x.dtype),
        )
    return out
