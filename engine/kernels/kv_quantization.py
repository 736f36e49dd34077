"""Quantized KV caches, by definition and in torch: fp8 with a scale per KV head, int8 with a scale per token and KV head.

A cache has the layout of `engine.plan.KVSpec`, [num_blocks, K, block_size, D] contiguous, in one byte a value; K and V
have scales of their own, float32:

| dtype | scales | value | error of a stored x |
|---|---|---|---|
| `torch.float8_e4m3fn` | [K], given before the first token (1.0 does) | stored · scale[head] | 2^-4 · abs(x), or 2^-10 · scale if that is more; beyond 448 · scale it saturates |
| `torch.int8` | [num_blocks, K, block_size], contiguous, written with each token | stored · scale[block, head, offset] | scale / 2, where scale is the largest value of the token's head / 127 |

On random tokens int8 was the more accurate, also where every 16th channel is ten times as large
(``tests/engine/kernels/test_kv_quantization.py``); it costs four bytes more a token and head. A scale per token and not per block: a block's largest value is not
known when its first tokens are stored, and rounding those again would make a token's bits depend on what follows it.

No device needs fp8 arithmetic for either: values are rounded by integer operations, widened to the compute dtype as they are
read, and multiplied in that. Where a checkpoint brings scales for its keys and values, they are not read: fp8's are 1.0.

Boundary: finite values; not-a-number is not kept. Nothing here allocates a cache or launches.
Source: e4m3 as in Micikevicius et al. 2022, ties to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTIZED_DTYPES = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}  # and the kernels' words for them
# Values of ``EngineConfig.kv_cache_dtype`` that quantize.
SETTINGS = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
FP8_MAX = 448.0
INT8_MAX = 127.0
NEGLIGIBLE = 1e-30  # a head of smaller values is stored as zeros: 127 divided by them might overflow


def cache_dtype(setting: str, dtype: torch.dtype) -> torch.dtype:
    """What a resolved ``EngineConfig.kv_cache_dtype`` makes of keys and values in `dtype`."""
    return torch.bfloat16 if setting == "bfloat16" else SETTINGS.get(setting, dtype)


def new_scales(cache: Tensor) -> Tensor:
    """Scales for an empty quantized cache: ones [K] for fp8, zeros [num_blocks, K, block_size] for int8."""
    if cache.dtype == torch.int8:
        return torch.zeros(cache.shape[:3], dtype=torch.float32, device=cache.device)
    return torch.ones(cache.shape[1], dtype=torch.float32, device=cache.device)


def check_scales(k_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Assert that a quantized cache comes with its scales, and any other with none."""
    for scale in (k_scale, v_scale):
        if k_cache.dtype not in QUANTIZED_DTYPES:
            assert scale is None, f"scales beside a cache in {k_cache.dtype}"
            continue
        assert scale is not None, f"a cache in {k_cache.dtype} without scales"
        shape = k_cache.shape[:3] if k_cache.dtype == torch.int8 else k_cache.shape[1:2]
        assert (scale.shape, scale.dtype) == (shape, torch.float32), (scale.shape, scale.dtype)
        assert scale.is_contiguous()


def quantized_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x [T, K, D] over scale [K] in e4m3, saturated."""
    return (x.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantized_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K, D] as int8 values and scales [T, K]."""
    x = x.float()
    largest = x.abs().amax(-1)
    top = torch.full_like(
        largest, INT8_MAX
    )  # a tensor: with a number, torch may multiply by a rounded reciprocal
    inverse = torch.where(largest > NEGLIGIBLE, top / largest, 0.0)
    return (x * inverse[..., None]).round().to(torch.int8), largest / top


def scale_of_tokens(cache: Tensor, scale: Tensor) -> Tensor:
    """The scale of each token and head, [num_blocks, K, block_size]: int8's own, or a view of fp8's."""
    return scale if scale.ndim == 3 else scale[None, :, None].expand(cache.shape[:3])


def dequantized(cache: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [num_blocks, K, block_size, D] that a quantized cache stands for."""
    return cache.to(dtype) * scale_of_tokens(cache, scale)[..., None].to(dtype)


def store_quantized_kv_ref(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k_scale: Tensor, v_scale: Tensor
) -> None:  # fmt: skip
    """Write k, v [T, K, D] to slots [T] of quantized caches and, in int8, their scales; negative slots are skipped."""
    kept = slot_mapping >= 0
    write_quantized(k[kept], v[kept], k_cache, v_cache, slot_mapping[kept], k_scale, v_scale)


def write_quantized(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, k_scale: Tensor, v_scale: Tensor
) -> None:  # fmt: skip
    """The same where no slot is negative: no shape depends on data, so that it can be captured."""
    block_size = k_cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if cache.dtype == torch.int8:
            cache[block, :, offset], scale[block, :, offset] = quantized_int8(x)
        else:
            cache.view(torch.int8)[block, :, offset] = quantized_fp8(x, scale).view(torch.int8)
