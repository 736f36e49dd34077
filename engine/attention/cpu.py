"""Paged attention on a CPU through the compiled kernel (``cpu_paged.cpp``); torch's reference where it cannot serve.

Compiled: float32, also over a cache in bfloat16, and bfloat16 with float32 sums; either over a quantized cache, which takes
less memory and more time: each tile is widened first. Other dtypes (float64 of the parity tests, float16), soft caps and
ALiBi go to the reference. A token's result has the same bits whatever shares the batch, however the prompt was cut, for every block size
and number of threads: the kernel needs no deterministic mode of its own.

Boundary: implements ``AttentionBackend``; `make_cpu_attention` picks and its `name` says what runs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.attention.interface import AttentionBackend, AttentionMetadata, check_layout
from engine.attention.reference import ReferenceAttention
from engine.kernels import cpu_library
from engine.kernels.cpu_library import CpuLibrary
from engine.kernels.kv_quantization import QUANTIZED_DTYPES, check_scales

COMPILED_DTYPES = (torch.float32, torch.bfloat16)
CACHE_KINDS = {
    torch.float8_e4m3fn: 1,
    torch.int8: 2,
    torch.bfloat16: 3,
}  # of any other dtype, the compute dtype: 0
_TABLES = (
    ("query_start", torch.int32),
    ("seq_lens", torch.int32),
    ("block_tables", torch.int32),
    ("slot_mapping", torch.int64),
)


class Heads(ctypes.Structure):
    """``quire::Heads`` of cpu_paged.cpp."""

    _fields_ = [
        ("query", ctypes.c_int64),
        ("kv", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("window", ctypes.c_int64),
    ]


class Paging(ctypes.Structure):
    """``quire::Paging`` of cpu_paged.cpp: raw pointers, valid while the tensors they came from live."""

    _fields_ = [
        ("query_start", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("max_blocks", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
    ]


class Caches(ctypes.Structure):
    """``quire::Caches`` of cpu_cache.h: raw pointers, valid while the tensors they came from live."""

    _fields_ = [
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_scale", ctypes.c_void_p),
        ("v_scale", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
    ]


def make_caches(k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> Caches:
    """One layer's caches as the kernels read them."""
    check_layout(k_cache, v_cache)
    check_scales(k_cache, k_scale, v_scale)
    k_scales, v_scales = (None if scale is None else scale.data_ptr() for scale in (k_scale, v_scale))
    kind = CACHE_KINDS.get(k_cache.dtype, 0)
    return Caches(k_cache.data_ptr(), v_cache.data_ptr(), k_scales, v_scales, kind)


def _is_compiled(dtype: torch.dtype, cache: torch.dtype) -> bool:
    """Whether the kernels take queries, keys and values in `dtype` over a cache in `cache`."""
    return dtype in COMPILED_DTYPES and cache in (dtype, torch.bfloat16, *QUANTIZED_DTYPES)


def make_cpu_attention(*, deterministic: bool = False) -> AttentionBackend:
    """The compiled backend where it can be built, else the reference (``cpu_library.unavailable_reason`` says why)."""
    library = cpu_library.load()
    if library is None:
        return ReferenceAttention(deterministic=deterministic)
    return CpuPagedAttention(library, deterministic=deterministic)


class CpuPagedAttention:
    """Implements ``AttentionBackend`` with the compiled kernel; torch's thread count counts."""

    name = "cpu"

    def __init__(self, library: CpuLibrary, *, deterministic: bool = False) -> None:
        self._library = library
        self._reference = ReferenceAttention(deterministic=deterministic)

    def store_kv(
        self,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        """Write k, v [T, K, D] to their slots of the caches [num_blocks, K, block_size, D]."""
        caches = make_caches(k_cache, v_cache, k_scale, v_scale)
        if not _is_compiled(k.dtype, k_cache.dtype):
            return self._reference.store_kv(
                k, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale
            )
        k, v, slots = _by_token(k), _by_token(v), slot_mapping.contiguous()
        if k.stride(0) != v.stride(0):
            k, v = k.contiguous(), v.contiguous()
        assert slots.dtype == torch.int64, slots.dtype
        _, kv_heads, block_size, size = k_cache.shape
        heads = Heads(kv_heads, kv_heads, size, 1.0, 0)
        self._library.functions.quire_store_kv(
            k.data_ptr(), v.data_ptr(), k.stride(0), ctypes.byref(caches), slots.data_ptr(), k.shape[0],
            ctypes.byref(heads), block_size, int(k.dtype == torch.bfloat16),
        )  # fmt: skip
        return None

    def forward(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attention of each token over its row's keys at positions ≤ its own: q [T, H, D] -> [T, H, D] in q's dtype."""
        caches = make_caches(k_cache, v_cache, k_scale, v_scale)
        if not _is_compiled(q.dtype, k_cache.dtype) or softcap or alibi_slopes is not None:
            return self._reference.forward(
                q, k_cache, v_cache, meta, scale=scale, sliding_window=sliding_window, softcap=softcap,
                alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale, out=out,
            )  # fmt: skip
        q = _by_token(q)
        out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
        assert out.is_contiguous(), f"out has strides {out.stride()}"
        assert out.shape == q.shape, (out.shape, q.shape)
        heads = Heads(q.shape[1], k_cache.shape[1], q.shape[2], scale, sliding_window or 0)
        paging = make_paging(meta, k_cache.shape[2])
        self._library.functions.quire_attention(
            ctypes.byref(paging), ctypes.byref(heads), q.data_ptr(), q.stride(0), ctypes.byref(caches), out.data_ptr(),
            int(q.dtype == torch.bfloat16), torch.get_num_threads(),
        )  # fmt: skip
        return out


def make_paging(meta: AttentionMetadata, block_size: int) -> Paging:
    """The step's tables as the kernels read them; `meta` must outlive the result."""
    for name, dtype in _TABLES:
        tensor = getattr(meta, name)
        assert tensor.dtype == dtype, f"{name} is {tensor.dtype}"
        assert tensor.stride(-1) == 1, f"{name} has strides {tensor.stride()}"
    return Paging(
        meta.query_start.data_ptr(),
        meta.seq_lens.data_ptr(),
        meta.block_tables.data_ptr(),
        meta.slot_mapping.data_ptr(),
        meta.seq_lens.shape[0],
        meta.block_tables.stride(0),
        block_size,
    )


def _by_token(x: Tensor) -> Tensor:
    """x [T, heads, D] with each token's heads side by side; tokens may be further apart (a view of merged q, k, v)."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
