"""What lies between the merged projection and attention, in one launch: query-key norm, rotary embedding, KV store.

Queries are normalised (Qwen3) and rotated in place, keys on their way into the cache, values go there as they are. Value
d pairs with d + D/2, as in Hugging Face checkpoints; positions index the table of cosines and sines in the kernel.
Arithmetic is float32, rounded where torch's operations round: after the norm, after its weight, after the rotation.
Keys and values of a quantized cache are rounded to it last, as `engine.kernels.kv_quantization` defines.
Reference: `RMSNorm` and `rotate` of `engine.models.layers`, then `store_kv_ref` or `store_quantized_kv_ref`.

A program computes whole heads of one token, in an order that the model's shape decides: a token's bits do not depend on
the rest of the batch.
Boundary: the cache has the model's dtype or is quantized, in the layout of `engine.plan.KVSpec`. It computes no angles
and no attention.

Shapes: T tokens, H query heads, K KV heads, D head size.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention.interface import check_layout
from engine.kernels.kv_quantization import QUANTIZED_DTYPES, check_scales
from engine.kernels.store_quantized_kv import fp8_code, int8_code, int8_inverse, int8_scale


@triton.jit
def _normalised(values, scale, weight, live, OFFSET: tl.constexpr):
    gain = tl.load(weight, mask=live, other=0.0).to(tl.float32)[None, :]
    if OFFSET:
        wide = values * scale * (1.0 + gain)
    else:
        wide = (values * scale).to(weight.dtype.element_ty).to(tl.float32) * gain
    return wide.to(weight.dtype.element_ty).to(tl.float32)


@triton.jit
def _rotated(
    cell, inside, live, cos, sin, weight, eps, HALF: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """Both halves of the heads at `cell` [heads, HALF], normalised with NORM, then rotated; in the dtype of `cell`."""
    first = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(cell + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
        scale = tl.rsqrt(mean + eps)[:, None]
        first = _normalised(first, scale, weight, live, OFFSET)
        second = _normalised(second, scale, weight + HALF, live, OFFSET)
    dtype = cell.dtype.element_ty
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _store(first, second, cache, scale, row, head, lane, live, HALF: tl.constexpr, CACHE: tl.constexpr):
    """Both halves of the heads [heads, HALF] to their rows of a cache; of a quantized one, with int8's scales."""
    if CACHE != "":
        first, second = first.to(tl.float32), second.to(tl.float32)
    if CACHE == "fp8":
        given = tl.load(scale + head)[:, None]
        first, second = fp8_code(first, given), fp8_code(second, given)
    elif CACHE == "int8":
        largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        inverse = int8_inverse(largest)[:, None]
        first, second = int8_code(first, inverse), int8_code(second, inverse)
        tl.store(scale + row, int8_scale(largest))
    target = cache + row[:, None] * (2 * HALF) + lane[None, :]
    tl.store(target, first, mask=live[None, :])
    tl.store(target + HALF, second, mask=live[None, :])


# Slices of the step's upload, aligned in some steps only: specialised, they would compile twice.
@triton.jit(do_not_specialize=["positions", "slot_mapping"])
def rotate_and_store_kernel(
    qkv, table, positions, k_cache, v_cache, slot_mapping, q_weight, k_weight, stride_token, eps, k_scale, v_scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,  # KV heads of one program; divides NUM_KV_HEADS
    Q_PAD: tl.constexpr, HALF_PAD: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Program (t, i): token t's KV heads from i * KV_HEADS on, and as many groups of query heads.

    A token of the qkv [T, (H + 2 K) 2 HALF] is its queries, then its keys, then its values.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    lane = tl.arange(0, HALF_PAD)
    live = lane < HALF
    angle = table + tl.load(positions + token) * (2 * HALF) + lane
    cos = tl.load(angle, mask=live, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=live, other=0.0)[None, :]
    heads = qkv + token * stride_token
    first_kv = tl.program_id(1) * KV_HEADS

    query = tl.arange(0, Q_PAD)
    cell = heads + (first_kv * GROUP + query)[:, None] * (2 * HALF) + lane[None, :]
    inside = (query < KV_HEADS * GROUP)[:, None] & live[None, :]
    first, second = _rotated(cell, inside, live, cos, sin, q_weight + lane, eps, HALF, NORM, OFFSET)
    tl.store(cell, first, mask=inside)
    tl.store(cell + HALF, second, mask=inside)

    kv_head = first_kv + tl.arange(0, KV_HEADS)
    row = (slot // BLOCK_SIZE * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    cell = heads + (NUM_KV_HEADS * GROUP + kv_head)[:, None] * (2 * HALF) + lane[None, :]
    first, second = _rotated(cell, live[None, :], live, cos, sin, k_weight + lane, eps, HALF, NORM, OFFSET)
    _store(first, second, k_cache, k_scale, row, kv_head, lane, live, HALF, CACHE)
    cell += NUM_KV_HEADS * (2 * HALF)
    first = tl.load(cell, mask=live[None, :], other=0.0)
    second = tl.load(cell + HALF, mask=live[None, :], other=0.0)
    _store(first, second, v_cache, v_scale, row, kv_head, lane, live, HALF, CACHE)


def rotate_and_store_constants(
    num_heads: int, num_kv_heads: int, head_size: int, block_size: int, *, norm: bool, offset: bool = False
) -> dict[str, int]:
    """Compile-time constants but CACHE; launch and compile tests read them here.

    A program takes KV heads until its queries give a warp 16 bytes a thread.
    """
    group, half, kv_heads = num_heads // num_kv_heads, head_size // 2, 1
    while num_kv_heads % (2 * kv_heads) == 0 and kv_heads * group * half < 256:
        kv_heads *= 2
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HALF": half,
        "BLOCK_SIZE": block_size,
        "KV_HEADS": kv_heads,
        "Q_PAD": triton.next_power_of_2(kv_heads * group),
        "HALF_PAD": triton.next_power_of_2(half),
        "NORM": norm,
        "OFFSET": offset,
    }


def rotate_and_store_warps(constants: dict[str, int]) -> int:
    """Warps of a program: a thread takes eight values of either half of the queries; at most eight warps."""
    return max(1, min(8, constants["Q_PAD"] * constants["HALF_PAD"] // 256))


def rotate_and_store(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    norm_offset: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Rotate q in place, store rotated k and v to slots [T] of the caches [num_blocks, K, block_size, D]; the q [T, H, D].

    qkv [T, (H + 2 K) D] may have any token stride, and the result is a view of it. `table` [positions, D] holds cosines,
    then sines; a position beyond it is not noticed. `q_norm` and `k_norm` [D]: weights of an RMSNorm over each head, before
    the rotation, with `norm_offset` 1 + weight. `k_scale` and `v_scale`: of a quantized cache. A token with a negative slot is padding: it is left as it is.
    """
    check_layout(k_cache, v_cache)
    _, num_kv_heads, block_size, size = k_cache.shape
    tokens, num_heads = qkv.shape[0], qkv.shape[1] // size - 2 * num_kv_heads
    assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * size, (qkv.shape, k_cache.shape)
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads over {num_kv_heads} KV heads"
    assert qkv.stride(1) == 1, qkv.stride()
    kind = QUANTIZED_DTYPES.get(k_cache.dtype, "")
    assert kind or k_cache.dtype == qkv.dtype, f"keys in {qkv.dtype}, cache in {k_cache.dtype}"
    check_scales(k_cache, k_scale, v_scale)
    assert (table.shape[1], table.dtype) == (size, torch.float32), (table.shape, table.dtype)
    assert table.is_contiguous()
    for index in (positions, slot_mapping):
        assert (index.shape, index.dtype) == ((tokens,), torch.int64), (index.shape, index.dtype)
        assert index.is_contiguous()
    assert (q_norm is None) == (k_norm is None), "q and k are normalised both or neither"
    for weight in (q_norm, k_norm):
        assert weight is None or (weight.shape == (size,) and weight.dtype == qkv.dtype), weight.shape
    if tokens:
        constants = rotate_and_store_constants(
            num_heads, num_kv_heads, size, block_size, norm=q_norm is not None, offset=norm_offset
        )
        if kind:
            k_cache, v_cache = k_cache.view(torch.int8), v_cache.view(torch.int8)
        rotate_and_store_kernel[(tokens, num_kv_heads // constants["KV_HEADS"])](
            qkv, table, positions, k_cache, v_cache, slot_mapping,
            qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, qkv.stride(0), eps, k_scale, v_scale,
            **constants, CACHE=kind, num_warps=rotate_and_store_warps(constants), enable_fp_fusion=False,
        )  # fmt: skip
    return qkv[:, : num_heads * size].view(tokens, num_heads, size)
