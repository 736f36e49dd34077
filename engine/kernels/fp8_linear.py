"""W8A8 products in float8_e4m3fn: weights with a scale per output, activations with a scale per token taken as they come.

The product is ``torch._scaled_mm`` with row-wise scales. Of torch 2.11 to 2.13: ``_scaled_mm(a, b, scale_a, scale_b,
bias=None, scale_result=None, out_dtype=None, use_fast_accum=False)`` with a [T, in] row-major, b [in, out] column-major,
scale_a [T, 1] and scale_b [1, out] in float32, in and out multiples of 16, compute capability 8.9 or higher. It picks
its algorithm by shape, so a row's bits may depend on T.

Boundary: one product; `fp8_linear_ref` is the oracle and what runs elsewhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.quantized_weight import Fp8Weight, quantize_rows_fp8

MIN_CAPABILITY = (8, 9)
FEATURE_MULTIPLE = 16  # of both sides of the weight


def fp8_linear(
    x: Tensor, weight: Fp8Weight, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``x @ W.T + bias``: x [T, in] bfloat16 on a GPU -> [T, out] bfloat16, written to `out` where given.

    Sums are kept in float32 (`use_fast_accum` off), and rounded once.
    """
    assert x.dtype == torch.bfloat16, x.dtype
    values, scales = quantize_rows_fp8(x)
    product = torch._scaled_mm(
        values,
        weight.values.t(),
        scales[:, None],
        weight.scales[None, :],
        bias=bias,
        out_dtype=torch.bfloat16,
    )
    return product if out is None else out.copy_(product)


def fp8_linear_ref(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """The same in torch, in float32 and rounded once to x's dtype; any device and dtype."""
    wide = F.linear(round_rows_fp8(x.float()), weight.dequantize(), None if bias is None else bias.float())
    return wide.to(x.dtype)


def round_rows_fp8(x: Tensor) -> Tensor:
    """x [T, in] with each value replaced by what its row's fp8 form holds of it, in x's dtype."""
    values, scales = quantize_rows_fp8(x)
    return (values.float() * scales[:, None]).to(x.dtype)
