"""Quantized KV caches: the store kernel to the bit, attention over them against float64, and the bits that must not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.random_step import PagedStep, excess_error, paged_step
from engine.attention.triton_paged import TritonPagedAttention
from engine.kernels.attention_tiles import SPLIT_TOKENS
from engine.kernels.kv_quantization import FP8_MAX, QUANTIZED_DTYPES, new_scales, store_quantized_kv_ref
from engine.kernels.store_quantized_kv import store_quantized_kv

ROWS = [(17, 1), (SPLIT_TOKENS + 1, 1), (35, 33), (SPLIT_TOKENS + 8, 16)]
CACHES = pytest.mark.parametrize("cache_dtype", list(QUANTIZED_DTYPES), ids=list(QUANTIZED_DTYPES.values()))


def _run(step: PagedStep, *, deterministic: bool = False, window: int | None = None, **form: Any) -> Tensor:
    return TritonPagedAttention(deterministic=deterministic).forward(
        step.q, step.k_cache, step.v_cache, step.meta, scale=step.scale, sliding_window=window,
        k_scale=step.k_scale, v_scale=step.v_scale, **form,
    )  # fmt: skip


def _every_kind_of_number() -> Tensor:
    """[T, 3, 80]: every e4m3 number and the middle between neighbours, zeros, tiny and saturated ones, and random ones."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    few = torch.tensor([0.0, 1e-38, 1e-9, 447.0, 463.9, 464.0, 465.0, 1e6, 1e37])
    torch.manual_seed(1)
    drawn = torch.randn(2000) * 10 ** torch.randn(2000)
    some = torch.cat((numbers, middles, few, drawn))
    both = torch.cat((some, -some, torch.zeros(-2 * len(some) % 240)))
    return torch.cat((both.view(-1, 3, 80), torch.zeros(1, 3, 80), torch.full((1, 3, 80), 1e-35)))


@CACHES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_stored_as_defined_to_the_bit(cache_dtype: torch.dtype, dtype: torch.dtype) -> None:
    k = _every_kind_of_number().to(dtype)
    merged = torch.cat((k, k.flip(2)), dim=1)  # k and v are views into a wider projection
    slots = torch.randperm(16 * 16)[: len(k)]
    slots[[3, 20]] = -1  # padding
    caches = [torch.full((16, 3, 16, 80), 7.0).to(cache_dtype) for _ in range(4)]
    scales = [new_scales(cache) for cache in caches]
    if cache_dtype != torch.int8:
        for scale in scales:
            scale.copy_(torch.tensor([1.0, 0.3, 7.0]))
    store_quantized_kv(merged[:, :3], merged[:, 3:], *caches[:2], slots, *scales[:2])
    store_quantized_kv_ref(merged[:, :3], merged[:, 3:], *caches[2:], slots, *scales[2:])
    for ours, theirs in zip((*caches[:2], *scales[:2]), (*caches[2:], *scales[2:]), strict=True):
        assert torch.equal(ours.view(torch.int8), theirs.view(torch.int8))
    assert (caches[0].view(torch.int8) != torch.full((), 7.0).to(cache_dtype).view(torch.int8)).any()


@CACHES
@pytest.mark.parametrize(
    ("dtype", "deterministic", "form"),
    [
        (torch.float32, False, {}),
        (torch.bfloat16, False, {}),
        (torch.float16, True, {}),
        (torch.float16, False, {"window": 90, "softcap": 20.0}),
    ],
    ids=["float32", "bfloat16", "float16-deterministic", "float16-window-softcap"],
)
def test_attention_over_a_quantized_cache_agrees_with_the_definition(
    cache_dtype: torch.dtype, dtype: torch.dtype, deterministic: bool, form: dict[str, Any]
) -> None:
    """Every e4m3 number and every whole number of int8 is read exactly, else float32 would show it."""
    step = paged_step(
        ROWS, num_kv_heads=2, group=2, head_size=80, dtype=dtype, cache_dtype=cache_dtype, outliers=10.0
    )
    excess = excess_error(_run(step, deterministic=deterministic, **form), step, **form)
    assert excess <= 1.0, f"the error is {excess:.2f} of what rounding allows"


@CACHES
def test_deterministic_decode_gives_the_bits_of_prefill(cache_dtype: torch.dtype) -> None:
    whole = paged_step(
        [(SPLIT_TOKENS + 12, 24)], num_kv_heads=1, group=2, head_size=64, dtype=torch.float16,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    want = _run(whole, deterministic=True)
    for begin, end in [(0, 11), (11, 12), (23, 24)]:
        got = _run(whole.part(0, begin, end), deterministic=True)
        assert torch.equal(got, want[begin:end]), (begin, end)


@CACHES
def test_a_row_decodes_to_the_same_bits_whatever_shares_the_batch(cache_dtype: torch.dtype) -> None:
    step = paged_step(
        [(300, 1), (SPLIT_TOKENS + 1, 1), (33, 33)], num_kv_heads=1, group=4, head_size=64,
        dtype=torch.float16, cache_dtype=cache_dtype,
    )  # fmt: skip
    together = _run(step)
    for row in range(2):
        assert torch.equal(_run(step.part(row, 0, 1)), together[row : row + 1]), row


def test_what_was_never_written_is_not_read() -> None:
    """Not-a-number is read as 480 from an fp8 cache: its poison must show in another way than in a result's isnan()."""
    step = paged_step(ROWS, num_kv_heads=1, group=2, head_size=64, cache_dtype=torch.float8_e4m3fn)
    want = _run(step)
    k_cache, v_cache = (
        torch.where(cache.float().isnan(), -FP8_MAX, cache.float()).to(cache.dtype)
        for cache in (step.k_cache, step.v_cache)
    )
    assert torch.equal(_run(replace(step, k_cache=k_cache, v_cache=v_cache)), want)


def test_a_quantized_cache_without_scales_is_a_bug() -> None:
    step = paged_step([(17, 1)], num_kv_heads=1, group=2, head_size=64, cache_dtype=torch.int8)
    with pytest.raises(AssertionError, match="without scales"):
        _run(replace(step, k_scale=None, v_scale=None))
