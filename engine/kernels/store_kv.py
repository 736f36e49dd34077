"""Store the step's keys and values into the KV cache, token by token through the slot mapping.

Boundary: writes the layout of `engine.plan.KVSpec`; a negative slot is skipped (padding of a captured batch). It does
not rotate, convert scales or allocate.
"""

# Triton reads kernel parameters by name and compiles the body; their types exist only at launch.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention.interface import check_layout

STORE_WARPS = 4


@triton.jit(do_not_specialize=["slot_mapping"])  # a slice of the step's upload, aligned in some steps only
def store_kv_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    stride_kt,
    stride_vt,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,  # NUM_KV_HEADS * HEAD_SIZE, padded to a power of two
):
    """One program stores one token: all its heads, keys and values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    lane = tl.arange(0, WIDTH)
    head = lane // HEAD_SIZE
    inside = lane < NUM_KV_HEADS * HEAD_SIZE
    block = slot // BLOCK_SIZE
    target = (
        (block * NUM_KV_HEADS + head) * (BLOCK_SIZE * HEAD_SIZE)
        + (slot % BLOCK_SIZE) * HEAD_SIZE
        + lane % HEAD_SIZE
    )
    keys = tl.load(k + token * stride_kt + lane, mask=inside)
    values = tl.load(v + token * stride_vt + lane, mask=inside)
    tl.store(k_cache + target, keys.to(k_cache.dtype.element_ty), mask=inside)
    tl.store(v_cache + target, values.to(v_cache.dtype.element_ty), mask=inside)


def store_constants(num_kv_heads: int, head_size: int, block_size: int) -> dict[str, int]:
    """The compile-time constants of a store; launch and compile tests read them here."""
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": block_size,
        "WIDTH": triton.next_power_of_2(num_kv_heads * head_size),
    }


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write k, v [T, K, D] to slots [T] of k_cache, v_cache [num_blocks, K, block_size, D].

    k and v may be views into a wider projection: heads must lie side by side, tokens may have any stride.
    """
    check_store(k, v, k_cache, v_cache, slot_mapping)
    tokens, heads, size = k.shape
    if tokens == 0:
        return
    store_kv_kernel[(tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        k.stride(0),
        v.stride(0),
        **store_constants(heads, size, k_cache.shape[2]),
        num_warps=STORE_WARPS,
    )


def check_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Assert the layouts that a store of k, v [T, K, D] counts on."""
    check_layout(k_cache, v_cache)
    tokens, heads, size = k.shape
    assert v.shape == k.shape, (k.shape, v.shape)
    assert (k_cache.shape[1], k_cache.shape[3]) == (heads, size), (k.shape, k_cache.shape)
    for tensor in (k, v):
        assert tensor.stride()[1:] == (size, 1), f"heads of a token are not side by side: {tensor.stride()}"
    assert slot_mapping.dtype == torch.int64
    assert slot_mapping.is_contiguous()
    assert slot_mapping.shape == (tokens,)


def store_kv_ref(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """The same in torch, any device and dtype."""
    block_size = k_cache.shape[2]
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    k_cache[slots // block_size, :, slots % block_size] = k[kept].to(k_cache.dtype)
    v_cache[slots // block_size, :, slots % block_size] = v[kept].to(v_cache.dtype)
