"""``x @ weight.T + bias`` whose rows keep their bits whatever the number of rows: deterministic mode's products on a GPU.

Libraries choose tile, order and split of the sum by the shape, and with them the rounding. Here one tile shape serves every
number of rows, a program sums over the whole of `in` from left to right, and nothing is split; so a row meets the same
instructions in the same order alone, in a batch and in a chunk of a prompt. What that costs against the library is
measured by the benchmark `invariant`.

Boundary: dense weights in one dtype with x, sums in float32. Reference: `torch.nn.functional.linear`.
Source of the idea: He and Thinking Machines Lab, "Defeating Nondeterminism in LLM Inference", 2025.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP_M = 8  # row tiles that are done side by side: their programs share columns of the weight in the cache
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["num_rows"])
def invariant_linear_kernel(
    out, x, weight, bias, num_rows, stride_x, stride_out,
    IN: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows by BLOCK_N outputs, all of `in`."""
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(OUT, BLOCK_N)
    program = tl.program_id(0)
    first_m = program // (GROUP * tiles_n) * GROUP
    rows_of_group = tl.minimum(tiles_m - first_m, GROUP)
    tile_m = first_m + program % (GROUP * tiles_n) % rows_of_group
    tile_n = program % (GROUP * tiles_n) // rows_of_group

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    real_row, real_column = row < num_rows, column < OUT
    x_at = x + row.to(tl.int64)[:, None] * stride_x + depth[None, :]
    weight_at = weight + column.to(tl.int64)[None, :] * IN + depth[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, IN, BLOCK_K):
        if IN % BLOCK_K == 0:
            left = tl.load(x_at, mask=real_row[:, None], other=0.0)
            right = tl.load(weight_at, mask=real_column[None, :], other=0.0)
        else:
            inside = begin + depth < IN
            left = tl.load(x_at, mask=real_row[:, None] & inside[None, :], other=0.0)
            right = tl.load(weight_at, mask=real_column[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=real_column, other=0.0).to(tl.float32)[None, :]
    target = out + row.to(tl.int64)[:, None] * stride_out + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=real_row[:, None] & real_column[None, :])


def linear_constants(
    size_in: int, size_out: int, has_bias: bool, dtype: torch.dtype
) -> dict[str, int | bool]:
    """Compile-time constants of a product; launch and compile tests read them here. Chosen from the weight alone."""
    # float32 multiplies outside the matrix units: small tiles, exactness before speed.
    block = (64, 64, 64) if dtype != torch.float32 else (16, 32, 32)
    return {
        "IN": size_in,
        "OUT": size_out,
        "HAS_BIAS": has_bias,
        "BLOCK_M": block[0],
        "BLOCK_N": block[1],
        "BLOCK_K": block[2],
        "GROUP": GROUP_M,
    }


def linear_options(dtype: torch.dtype) -> dict[str, int]:
    """Compile options of a product."""
    return {"num_warps": 4, "num_stages": 4 if dtype != torch.float32 else 2}


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in], plus bias [out]: [T, out] in x's dtype. x may have any row stride."""
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    assert x.dtype in DTYPES, x.dtype
    assert x.ndim == 2, x.shape
    assert x.stride(1) == 1, x.stride()
    assert weight.is_contiguous()
    rows, size_in = x.shape
    size_out = weight.shape[0]
    assert weight.shape[1] == size_in, (x.shape, weight.shape)
    out = torch.empty(rows, size_out, dtype=x.dtype, device=x.device)
    if rows:
        constants = linear_constants(size_in, size_out, bias is not None, x.dtype)
        grid = (triton.cdiv(rows, constants["BLOCK_M"]) * triton.cdiv(size_out, constants["BLOCK_N"]),)
        invariant_linear_kernel[grid](
            out, x, weight, weight if bias is None else bias, rows, x.stride(0), out.stride(0),
            **constants, **linear_options(x.dtype),
        )  # fmt: skip
    return out
