"""Store the step's keys and values into a quantized KV cache, token by token through the slot mapping.

Boundary: writes what `engine.kernels.kv_quantization` defines, to the bit; a negative slot is skipped (padding of a
captured batch). What a token is stored as depends on nothing but the token and, in fp8, its head's scale.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.kv_quantization import QUANTIZED_DTYPES, check_scales
from engine.kernels.store_kv import check_store

# A product that was contracted into the addition behind it would round other than the definition does.
STORE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _e4m3(x):
    """The bits of the e4m3 number nearest to float32 x, by integer arithmetic: compute capability 8.0 has no fp8."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448.0
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 numbers are 2^-9 apart, as float32's are from 2^14 on.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, normal)  # 2^-6
    return (((bits >> 24) & 0x80) | code).to(tl.int8)


@triton.jit
def fp8_code(x, scale):
    """Float32 x over its head's scale, as the bits of e4m3."""
    return _e4m3(tl.div_rn(x, scale))


@triton.jit
def int8_inverse(largest):
    """What a head's float32 values are multiplied by, given the largest of them."""
    stored = largest > 1e-30
    return tl.where(stored, tl.div_rn(127.0, tl.where(stored, largest, 1.0)), 0.0)


@triton.jit
def int8_code(x, inverse):
    """Added to 1.5 * 2^23 a number is rounded to a whole one, which the low bits of the sum hold."""
    return ((x * inverse + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def int8_scale(largest):
    return tl.div_rn(largest, 127.0)


@triton.jit
def _store(
    x, cache, scale, slot, stride_token,
    NUM_KV_HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS_PAD)
    dim = tl.arange(0, HEAD_PAD)
    real = head < NUM_KV_HEADS
    inside = real[:, None] & (dim < HEAD_SIZE)[None, :]
    source = tl.program_id(0).to(tl.int64) * stride_token + head[:, None] * HEAD_SIZE + dim[None, :]
    values = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    place = (slot // BLOCK_SIZE * NUM_KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    if CACHE == "fp8":
        code = fp8_code(values, tl.load(scale + head, mask=real, other=1.0)[:, None])
    else:
        largest = tl.max(tl.abs(values), 1)
        code = int8_code(values, int8_inverse(largest)[:, None])
        tl.store(scale + place, int8_scale(largest), mask=real)
    tl.store(cache + (place * HEAD_SIZE)[:, None] + dim[None, :], code, mask=inside)


@triton.jit(do_not_specialize=["slot_mapping"])  # a slice of the step's upload, aligned in some steps only
def store_quantized_kv_kernel(
    k, v, k_cache, v_cache, k_scale, v_scale, slot_mapping, stride_kt, stride_vt,
    NUM_KV_HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """One program stores one token: all its heads, keys and values."""
    slot = tl.load(slot_mapping + tl.program_id(0))
    if slot < 0:
        return
    _store(
        k, k_cache, k_scale, slot, stride_kt, NUM_KV_HEADS, HEADS_PAD, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, CACHE
    )
    _store(
        v, v_cache, v_scale, slot, stride_vt, NUM_KV_HEADS, HEADS_PAD, HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, CACHE
    )


def store_quantized_constants(
    num_kv_heads: int, head_size: int, block_size: int, cache_dtype: torch.dtype
) -> dict[str, int | str]:
    """The compile-time constants of a store; launch and compile tests read them here."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "HEADS_PAD": triton.next_power_of_2(num_kv_heads),
        "HEAD_SIZE": head_size,
        "HEAD_PAD": triton.next_power_of_2(head_size),
        "BLOCK_SIZE": block_size,
        "CACHE": QUANTIZED_DTYPES[cache_dtype],
    }


def store_quantized_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k_scale: Tensor, v_scale: Tensor
) -> None:  # fmt: skip
    """Write k, v [T, K, D] to slots [T] of quantized caches [num_blocks, K, block_size, D] and, in int8, their scales.

    k and v may be views into a wider projection: heads must lie side by side, tokens may have any stride.
    """
    check_store(k, v, k_cache, v_cache, slot_mapping)
    check_scales(k_cache, k_scale, v_scale)
    tokens, heads, size = k.shape
    if tokens == 0:
        return
    store_quantized_kv_kernel[(tokens,)](
        k, v, k_cache.view(torch.int8), v_cache.view(torch.int8), k_scale, v_scale, slot_mapping,
        k.stride(0), v.stride(0), **store_quantized_constants(heads, size, k_cache.shape[2], k_cache.dtype),
        **STORE_OPTIONS,
    )  # fmt: skip
