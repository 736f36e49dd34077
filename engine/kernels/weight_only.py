"""Weight-only products: ``y = x W^T + b`` with x [T, in] in 16 bits and W held in int8 or int4.

Two forms of one computation, outputs by tokens as the matrix units see it (W is the left operand, so that its values
go from memory through registers into the product). *Few tokens* (T <= 16): bound by reading W once; a program owns
BLOCK_N outputs, and each of its warps reads another slice of the inputs. *Many tokens*: tiles of outputs and tokens.

Rounding: none of W's values is rounded again. Integers are exact in x's dtype and so are their products in float32;
scales multiply the float32 sums (of a whole row in int8, of each group in int4), and the result is rounded once.

A row's bits do not depend on the rows beside it, nor, within a form, on T: inputs are added in one fixed order. The two
forms order them differently; deterministic mode therefore takes the form of many tokens, with one tile, for any T.
Launches depend on shapes alone. Boundary: no activation quantization, no float32 activations; formats are those of
`engine.kernels.quantized_weight`; reference: `weight_only_linear_ref`.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.quantized_weight import GROUP, Int4Weight, Int8Weight

FEW_TOKENS = 16  # the narrowest tile of tokens that the matrix units take whole
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _int4_product(packed, zero, inputs, upper):
    """(low halves of the bytes - zero) · inputs + (8 + high halves - zero) · upper, in float32.

    The high half stays where it is in its byte, as 16 times its number: such integers and their differences, to 240,
    are exact in either 16-bit type, and the device masks, converts and subtracts two signed bytes at once, but not
    shifted or unsigned ones.
    """
    dtype = inputs.dtype
    high = (packed & -16).to(tl.float32).to(dtype) - (zero * 16.0 - 128.0).to(dtype)
    low = (packed & 15).to(tl.float32).to(dtype) - zero.to(dtype)
    return tl.dot(low, inputs, tl.dot(high, upper) * 0.0625)


@triton.jit(do_not_specialize=["num_tokens"])
def few_tokens_kernel(
    out, x, values, scales, zeros, bias, num_tokens, out_features, in_features, stride_x, stride_out,
    BITS: tl.constexpr, GROUP: tl.constexpr, SLICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of all tokens. A step takes SLICES groups of inputs, a warp each; the warps' sums
    are added at the end. WHOLE: the inputs are a multiple of a step."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_row = row < out_features
    token = tl.arange(0, BLOCK_T)
    live_token = (token < num_tokens)[None, None, :]
    part = tl.arange(0, SLICES)
    width: tl.constexpr = GROUP * BITS // 8  # bytes of a group
    lane = tl.arange(0, width)
    num_groups = tl.cdiv(in_features, GROUP)
    cell = values + row.to(tl.int64)[None, :, None] * (num_groups * width) + lane[None, None, :]
    source = x + token.to(tl.int64)[None, None, :] * stride_x + lane[None, :, None]
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_T], tl.float32)
    for first in range(0, num_groups, SLICES):
        group = first + part
        live = live_row[None, :] & (group < num_groups)[:, None]
        begin = (group * GROUP)[:, None, None]
        packed = tl.load(cell + (group * width)[:, None, None], mask=live[:, :, None], other=0)
        if WHOLE:
            here = live_token
        else:
            here = live_token & (begin + lane[None, :, None] < in_features)
        inputs = tl.load(source + begin, mask=here, other=0.0)
        if BITS == 8:
            acc = tl.dot(packed.to(tl.float32).to(x.dtype.element_ty), inputs, acc)
        else:
            place = group[:, None] * out_features + row[None, :]
            scale = tl.load(scales + place, mask=live, other=0.0).to(tl.float32)[:, :, None]
            zero = tl.load(zeros + place, mask=live, other=0).to(tl.float32)[:, :, None]
            if not WHOLE:
                here = live_token & (begin + lane[None, :, None] + width < in_features)
            upper = tl.load(source + begin + width, mask=here, other=0.0)
            acc += _int4_product(packed, zero, inputs, upper) * scale
    result = tl.sum(acc, 0)
    if BITS == 8:
        result *= tl.load(scales + row, mask=live_row, other=0.0)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + row, mask=live_row, other=0.0).to(tl.float32)[:, None]
    target = out + token.to(tl.int64)[None, :] * stride_out + row[:, None]
    inside = live_row[:, None] & (token < num_tokens)[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def many_tokens_kernel(
    out, x, values, scales, zeros, bias, num_tokens, out_features, in_features, stride_x, stride_out,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of BLOCK_T tokens, group of inputs by group. WHOLE: the last group is full."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    live_row = row < out_features
    live_token = (token < num_tokens)[None, :]
    width: tl.constexpr = GROUP * BITS // 8  # bytes of a group
    lane = tl.arange(0, width)
    num_groups = tl.cdiv(in_features, GROUP)
    cell = values + row.to(tl.int64)[:, None] * (num_groups * width) + lane[None, :]
    source = x + token.to(tl.int64)[None, :] * stride_x + lane[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for group in range(num_groups):
        begin = group * GROUP
        packed = tl.load(cell + group * width, mask=live_row[:, None], other=0)
        if WHOLE:
            here = live_token
        else:
            here = live_token & (begin + lane[:, None] < in_features)
        inputs = tl.load(source + begin, mask=here, other=0.0)
        if BITS == 8:
            acc = tl.dot(packed.to(tl.float32).to(x.dtype.element_ty), inputs, acc)
        else:
            place = group * out_features + row
            scale = tl.load(scales + place, mask=live_row, other=0.0).to(tl.float32)[:, None]
            zero = tl.load(zeros + place, mask=live_row, other=0).to(tl.float32)[:, None]
            if not WHOLE:
                here = live_token & (begin + lane[:, None] + width < in_features)
            upper = tl.load(source + begin + width, mask=here, other=0.0)
            acc += _int4_product(packed, zero, inputs, upper) * scale
    if BITS == 8:
        acc *= tl.load(scales + row, mask=live_row, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias + row, mask=live_row, other=0.0).to(tl.float32)[:, None]
    target = out + token.to(tl.int64)[None, :] * stride_out + row[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=live_row[:, None] & live_token)


@dataclass(frozen=True, slots=True)
class Launch:
    """One compiled form and its grid; compile tests read the same table as the launch."""

    few: bool
    grid: tuple[int, int]
    constants: dict[str, int | bool]
    options: dict[str, int]


def plan_launch(
    bits: int, num_tokens: int, out_features: int, in_features: int, *, has_bias: bool, deterministic: bool
) -> Launch:
    """The form and tile of a product, from shapes alone.

    Source: tiles follow from the memory of a multiprocessor (163 KiB shared on compute capability 8.0) and from what
    must be in flight to keep it reading; they have been compiled but not yet timed on one.
    """
    constants: dict[str, int | bool] = {"BITS": bits, "GROUP": GROUP, "HAS_BIAS": has_bias}
    if num_tokens <= FEW_TOKENS and not deterministic:
        block_n, slices = 32, 4
        whole = in_features % (slices * GROUP) == 0
        constants |= {"SLICES": slices, "BLOCK_N": block_n, "BLOCK_T": FEW_TOKENS, "WHOLE": whole}
        return Launch(
            True, (-(-out_features // block_n), 1), constants, {"num_warps": slices, "num_stages": 4}
        )
    wide = num_tokens > 64 and not deterministic
    block_n = 128 if wide else 64
    block_t = 128 if wide and bits == 8 else 64  # int4 keeps a second sum, that of the group
    constants |= {"BLOCK_N": block_n, "BLOCK_T": block_t, "WHOLE": in_features % GROUP == 0}
    grid = (-(-out_features // block_n), -(-num_tokens // block_t))
    return Launch(False, grid, constants, {"num_warps": 8 if wide else 4, "num_stages": 3})


def weight_only_linear(
    x: Tensor,
    weight: Int8Weight | Int4Weight,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """``x @ W.T + bias``: x [T, in], of any row stride, -> [T, out] in x's dtype, written to `out` where given.

    Deterministic: a row has the same bits whatever T is.
    """
    tokens, out_features = x.shape[0], weight.out_features
    assert x.shape[1] == weight.in_features, (x.shape, weight.in_features)
    assert x.dtype in DTYPES, x.dtype
    assert x.stride(1) == 1, x.stride()
    assert weight.values.is_contiguous()
    assert bias is None or (bias.shape == (out_features,) and bias.is_contiguous())
    if out is None:
        out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    assert (out.shape, out.dtype, out.stride(1)) == ((tokens, out_features), x.dtype, 1), (
        out.shape,
        out.dtype,
    )
    if tokens == 0:
        return out
    int4 = isinstance(weight, Int4Weight)
    launch = plan_launch(
        4 if int4 else 8, tokens, out_features, weight.in_features, has_bias=bias is not None, deterministic=deterministic
    )  # fmt: skip
    kernel = few_tokens_kernel if launch.few else many_tokens_kernel
    zeros = weight.zeros if isinstance(weight, Int4Weight) else weight.scales  # not read in int8
    kernel[launch.grid](
        out, x, weight.values, weight.scales, zeros, x if bias is None else bias, tokens, out_features, weight.in_features,
        x.stride(0), out.stride(0), **launch.constants, **launch.options,
    )  # fmt: skip
    return out


def weight_only_linear_ref(x: Tensor, weight: Int8Weight | Int4Weight, bias: Tensor | None = None) -> Tensor:
    """The same in torch, in float32 and rounded once to x's dtype; any device and dtype."""
    wide = F.linear(x.float(), weight.dequantize(), None if bias is None else bias.float())
    return wide.to(x.dtype)
