"""RMSNorm over the last dimension, one row a program; on request the residual is added first, in the same launch.

The sum over a row has one fixed order that the row's size alone decides, and no program sees a second row: a row's bits
do not depend on the number of rows or on its neighbours. torch's own mean picks its blocks by the number of rows.
Reference: `engine.models.layers.RMSNorm` in torch's operations.
Boundary: no bias, no quantized output. Norms of heads: `engine.kernels.rotary`.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(
    out, x, residual, weight, stride_x, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """Row i of `out` [rows, SIZE] is row i of x, normalised. With ADD it is that of residual + x, kept as the residual. With
    OFFSET the weight is 1 + `weight`.

    `out` may be x: a program has read its row before it writes it.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    inside = lane < SIZE
    wide = tl.load(x + row * stride_x + lane, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        cell = residual + row * SIZE + lane
        total = wide + tl.load(cell, mask=inside, other=0.0).to(tl.float32)
        kept = total.to(residual.dtype.element_ty)
        tl.store(cell, kept, mask=inside)
        wide = kept.to(tl.float32)  # the norm is that of the residual as it is kept
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    gain = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    # As checkpoints were trained: rounded, then weighted; Gemma's weighted, then rounded.
    if OFFSET:
        result = wide * scale * (1.0 + gain)
    else:
        result = (wide * scale).to(x.dtype.element_ty).to(tl.float32) * gain
    tl.store(out + row * SIZE + lane, result.to(out.dtype.element_ty), mask=inside)


def rms_norm_constants(size: int, *, add: bool, offset: bool = False) -> dict[str, int]:
    """Compile-time constants; launch and compile tests read them here."""
    return {"SIZE": size, "WIDTH": triton.next_power_of_2(size), "ADD": add, "OFFSET": offset}


def rms_norm_warps(size: int) -> int:
    """Warps per row: eight values a thread up to eight warps, then up to 32 values a thread before there are more."""
    width = int(triton.next_power_of_2(size))
    return max(1, min(8, width // 256), width // 1024)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: bool = False) -> Tensor:
    """``x / rms(x) * weight`` for x [T, size], whose rows may have any stride; contiguous result. `offset`: 1 + weight."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(out, x, None, weight, eps, offset)
    return out


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: bool = False
) -> Tensor:
    """``residual += x``, then the norm of it as `rms_norm`, written over x and returned. Both [T, size], contiguous."""
    assert (residual.shape, residual.dtype) == (x.shape, x.dtype), (residual.shape, residual.dtype)
    assert residual.is_contiguous(), residual.stride()
    assert x.is_contiguous(), x.stride()
    _launch(x, x, residual, weight, eps, offset)
    return x


def _launch(
    out: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: bool
) -> None:
    rows, size = x.shape
    assert x.stride(1) == 1, x.stride()
    assert weight.shape == (size,), (weight.shape, size)
    assert weight.is_contiguous()
    if rows:
        rms_norm_kernel[(rows,)](
            out,
            x,
            x if residual is None else residual,
            weight,
            x.stride(0),
            eps,
            **rms_norm_constants(size, add=residual is not None, offset=offset),
            num_warps=rms_norm_warps(size),
        )
