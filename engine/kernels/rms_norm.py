"""RMSNorm over the last dimension, one row a program.

The sum over a row has one fixed order, whatever the number of rows, so a row's result does not depend on its neighbours;
torch's own mean picks its blocks by the number of rows. Reference: `engine.models.layers.RMSNorm` in torch's operations.
Boundary: no residual, no bias, no quantized output.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["num_heads"])
def rms_norm_kernel(
    out, x, weight, stride_token, stride_head, num_heads, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Row i of `out` [rows, SIZE] is row (i // num_heads, i % num_heads) of x, normalised."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    inside = lane < SIZE
    source = x + row // num_heads * stride_token + row % num_heads * stride_head
    wide = tl.load(source + lane, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    rounded = (
        (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    )  # as checkpoints were trained: rounded, then weighted
    result = rounded * tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + lane, result.to(out.dtype.element_ty), mask=inside)


def rms_norm_constants(size: int) -> dict[str, int]:
    """Compile-time constants; launch and compile tests read them here."""
    return {"SIZE": size, "WIDTH": triton.next_power_of_2(size)}


def rms_norm_warps(size: int) -> int:
    """Warps per row: eight values a thread, at most eight warps."""
    return max(1, min(8, int(triton.next_power_of_2(size)) // 256))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` for x [T, size] or [T, heads, size] of any strides but the last; contiguous result."""
    assert x.ndim in (2, 3), x.shape
    size = x.shape[-1]
    assert x.stride(-1) == 1, x.stride()
    assert weight.shape == (size,), (weight.shape, size)
    assert weight.is_contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads, stride_head = (x.shape[1], x.stride(1)) if x.ndim == 3 else (1, 0)
    if x.numel():
        rms_norm_kernel[(x.shape[0] * heads,)](
            out,
            x,
            weight,
            x.stride(0),
            stride_head,
            heads,
            eps,
            **rms_norm_constants(size),
            num_warps=rms_norm_warps(size),
        )
    return out
